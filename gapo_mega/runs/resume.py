"""Compares a configuration with the checkpoint to go on from: refused by name, or taken and logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gapo_mega.runs.identity import Identity, Rule, objective_names

# What a fingerprint is of, and the setting that errors name for it.
TRAINING_ROWS, HELDOUT_ROWS, TEMPLATE = "training rows", "held-out rows", "chat template"
POLICY, CRITIC = "policy", "critic"
CONFIGURATION = "configuration of the policy"
_NAMED = {
    TRAINING_ROWS: ("data.source",),
    HELDOUT_ROWS: ("data.heldout_source", "data.source"),
    TEMPLATE: ("model.chat_template", "data.chat_template"),
    POLICY: ("model.path",),
    CONFIGURATION: ("model.path",),
    CRITIC: ("critic.path", "model.path"),
}
_CONTENTS = {
    Rule.ROWS: (TRAINING_ROWS, HELDOUT_ROWS),
    Rule.MODEL: (POLICY, CONFIGURATION),
    Rule.CRITIC: (CRITIC,),
    Rule.TEMPLATE: (TEMPLATE,),
}
_WAYS_OUT = "the checkpoint's value, another output_dir, or --overwrite"


@dataclass
class Comparison:
    """What differs between a checkpoint and a configuration."""

    refused: list[str] = field(default_factory=list)  # one sentence each
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # by setting: old and new value
    unchecked: list[str] = field(default_factory=list)  # settings that the checkpoint says nothing of

    def raise_refused(self) -> None:
        """Raise ``ValueError`` with the first refusal, in one line, where there is any."""
        if self.refused:
            more = f"; {len(self.refused) - 1} more after this one" if len(self.refused) > 1 else ""
            raise ValueError(self.refused[0] + more)


def compare_settings(
    saved: Mapping[str, Any],
    mine: Mapping[str, Any],
    rules: Mapping[str, Rule],
    where: str,
) -> Comparison:
    """Compare settings by dotted name; ``where`` names the checkpoint in errors."""
    found = Comparison()
    old, new = objective_names(saved), objective_names(mine)
    if old != new:
        found.refused.append(_refusal("objectives", ", ".join(new), ", ".join(old), where, "in this order"))
        return found
    for key, value in mine.items():
        rule = rules.get(key, Rule.FREE)
        if key not in saved:
            if rule is not Rule.FREE:  # of what may change there is nothing to check
                found.unchecked.append(key)
            continue
        before = saved[key]
        if before == value:
            continue
        if rule is Rule.CODE:
            _compare_code(found, key, before, value, where)
        elif rule is Rule.FIXED:
            found.refused.append(_refusal(key, value, before, where))
        else:
            found.changed[key] = (before, value)
    return found


def compare_contents(
    saved: Mapping[str, Any],
    mine: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    settings: Mapping[str, Any],
    rules: Mapping[str, Rule],
    where: str,
) -> Comparison:
    """Compare fingerprints; ``changed`` has those of ``settings`` that differ, maybe the reason."""
    found = Comparison()
    for key, value in mine.items():
        if key not in saved:
            found.unchecked.append(key)
        elif saved[key] != value:
            reasons = [
                f"{name} {_shown(old)} -> {_shown(new)}"
                for name, (old, new) in changed.items()
                if key in _CONTENTS.get(rules.get(name, Rule.FREE), ())
            ]
            parameter = parameter_of(key, settings)
            because = f" ({', '.join(reasons)})" if reasons else ""
            found.refused.append(
                f"{parameter}: found other {_called(key)} than {where} has been trained with{because}: "
                f"{_facts(saved[key], value)} there, {_facts(value, saved[key])} now; "
                "accepted: the same, another output_dir, or --overwrite"
            )
    return found


def changes_of_schedule(changed: Mapping[str, tuple[Any, Any]], mine: Identity, total: str) -> list[str]:
    """What another number of steps does to learning rates, in sentences."""
    if total not in changed:
        return []
    old, new = changed[total]
    sections = ("optimizer", "critic.optimizer")
    return [
        f"the {mine.settings[f'{section}.schedule']} schedule of {section}.lr takes {new} optimizer steps "
        f"now, and not {old}: the learning rate goes on from another point of it"
        for section in sections
        if mine.settings.get(f"{section}.schedule", "constant") != "constant"
        or mine.settings.get(f"{section}.warmup_fraction", 0)
    ]


def parameter_of(content: str, settings: Mapping[str, Any]) -> str:
    """The setting that errors name for a fingerprint: the first that is given, or what it is called."""
    names = [name for name in _NAMED.get(content, ()) if name in settings]
    return next((name for name in names if settings[name] is not None), names[0] if names else content)


def told(changed: Mapping[str, Sequence[Any]]) -> str:
    """``name old -> new``, one after the other."""
    return ", ".join(f"{key} {_shown(old)} -> {_shown(new)}" for key, (old, new) in changed.items())


def _compare_code(found: Comparison, key: str, before: Any, value: Any, where: str) -> None:
    """A file may move, and its text may change, but not both at once: that would be other code."""
    if not (isinstance(before, dict) and isinstance(value, dict)) or before["name"] != value["name"]:
        found.refused.append(_refusal(key, _of_code(value), _of_code(before), where))
    elif before["sha256"] == value["sha256"] or before["file"] == value["file"]:
        found.changed[key] = (_of_code(before), _of_code(value))
    else:
        found.refused.append(_refusal(key, _of_code(value), _of_code(before), where))


def _of_code(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['file']}:{value['name']} ({value['sha256']})"
    return str(value)


def _refusal(key: str, new: Any, old: Any, where: str, more: str = "") -> str:
    accepted = f"{_shown(old)}{' ' + more if more else ''}"
    return f"{key}: found {_shown(new)}, but {where} was written with {accepted}; accepted: {_WAYS_OUT}"


def _called(key: str) -> str:
    if key in (TRAINING_ROWS, HELDOUT_ROWS, TEMPLATE, CONFIGURATION):
        return key
    return f"weights of the {key}" if key in _NAMED else "weights"


def _facts(fingerprint: Any, other: Any) -> str:
    """A fingerprint in words; of one that has no digest, what ``other`` has otherwise."""
    if not isinstance(fingerprint, dict):
        return str(fingerprint)
    whole = "sha256" in fingerprint or not isinstance(other, dict)
    shown = {k: v for k, v in fingerprint.items() if whole or k not in other or other[k] != v}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 300 else text[:297] + "..."
