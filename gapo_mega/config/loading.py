"""Reads a run's configuration: one YAML file, then dotted overrides in order; writes it back resolved.

Every error is a one-line ``ValueError`` that names the parameter by its full dotted path, what was
found, what is accepted, and the file or the override that it came from.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, overload

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gapo_mega.config import Config, Section
from gapo_mega.config.core_schema import check_size, parse_document, parse_value, written
from gapo_mega.config.supervised import SupervisedConfig
from gapo_mega.config.unusable import Location, first_unusable
from gapo_mega.credentials import first_written_out, names_a_secret
from gapo_mega.files import local, read_text, write_private
from gapo_mega.option_checks import HIDDEN, shown, shown_name, without_password
from gapo_mega.user_code import is_subclass

# (value of ``method``, folders with the user's own code) -> sections
Expand = Callable[[object, Sequence[Path]], dict[str, Any]]
Kind = TypeVar("Kind", bound=Section)

logger = logging.getLogger(__name__)

_TYPE = re.compile(r"[\[(]|^(str|int|float|bool)$")
_LONGEST_PATH = 160  # characters of a key's path that an error shows
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
SECTIONS_OF_METHOD = ("aggregation", "scalarization")
# Where settings have moved, by what they configure; files and overrides may still use the old name.
MOVED: dict[type[Section], dict[str, str]] = {
    Config: {"algorithm.clip_epsilon": "loss.options.clip_epsilon"},
    SupervisedConfig: {"evaluate_every": "evaluation.every_steps"},
}


@overload
def load(path: str | Path, overrides: Sequence[str] = (), *, expand: Expand | None = None) -> Config: ...


@overload
def load(path: str | Path, overrides: Sequence[str] = (), *, kind: type[Kind]) -> Kind: ...


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    kind: type[Section] = Config,
    expand: Expand | None = None,
) -> Section:
    """The configuration in the YAML file ``path`` with ``key.sub=value`` overrides applied in order.

    The file is YAML by ``core_schema.parse_document``, an override's value what ``core_schema.parse_value``
    makes of it; list items are reached by index (``objectives.0.name=x``). ``kind`` is the class that the
    whole file describes. ``expand`` makes sections of the key ``method`` of a training configuration, before
    any override but ``method=`` is applied (``planning.methods.load`` passes it). It looks for the user's own
    code in the working directory, then in the file's folder, and puts the absolute path into the
    configuration.
    Raises ``ValueError`` for a missing file, broken YAML, unknown keys, wrong types and ranges.
    """
    file = local(path)
    data = _read(file, kind)
    if issubclass(kind, Config):
        overrides = _take_method(data, overrides, file, expand)
    return parse(data, overrides, kind, file, file.parent)


def parse(
    data: dict[str, Any],
    overrides: Sequence[str],
    kind: type[Kind],
    source: str | Path,
    folder: Path | None = None,
) -> Kind:
    """``data`` with the overrides applied to it, as :func:`load` does; ``source`` is what errors call it.

    ``folder``: where to look for the user's own code after the working directory.
    """
    folders = _folders(folder)
    moved = next((places for base, places in MOVED.items() if issubclass(kind, base)), {})
    told = _move(data, moved, source)
    applied: list[tuple[Location, str]] = []
    for override in overrides:
        location = _apply(data, override)
        told |= _move(data, moved)
        applied.append((location, override))
    _refuse_both(overrides, told)
    check_size(data, source)
    for old, new in told.items():
        logger.warning("%s is now %s", old, new)
    _refuse_unusable(data, applied, source)
    _refuse_written_out(data, applied, source)
    try:
        # Strict: "true" is no integer and "3" no number; YAML already knows the difference.
        return kind.model_validate(data, strict=True, context={"folders": folders})
    except ValidationError as error:
        message, location = explain(error, kind)
    raise ValueError(f"{message} ({_origin(location, applied, source)})")


def _folders(folder: Path | None) -> list[Path]:
    """Where to look for the user's own code."""
    here = Path.cwd()
    return [here] if folder is None or here == here / folder else [here, here / folder]


def _take_method(
    data: dict[str, Any], overrides: Sequence[str], file: Path, expand: Expand | None
) -> list[str]:
    """Put the sections into ``data`` that ``method`` stands for; return the overrides without it.

    Of several the last override wins, and any wins over the file.
    """
    rest: list[str] = []
    wanted: list[str] = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.startswith("method."):
            raise ValueError(
                f"{_dotted([key])}: found in the override {_said(override)}, accepted: method=NAME, and "
                "options by aggregation.options.KEY or scalarization.options.KEY"
            )
        (wanted if key == "method" else rest).append(override)
    if wanted:
        _apply(data, wanted[-1])
        for section in SECTIONS_OF_METHOD:
            data.pop(section, None)
    if "method" not in data:
        return rest
    method, source = data.pop("method"), f"override {wanted[-1]!r}" if wanted else f"{file}"
    beside = [section for section in SECTIONS_OF_METHOD if section in data]
    if beside:
        raise ValueError(f"method: found beside {beside[0]}, accepted: one of them (from {source})")
    if expand is None:
        raise ValueError(
            f"method: found {_shown(method)}, accepted: none (gapo_mega.planning.methods.load reads "
            f"configurations with it; from {source})"
        )
    try:
        data |= expand(method, _folders(file.parent))
    except ValueError as error:
        raise ValueError(f"{error} (from {source})") from None
    return rest


def dump(config: Section, path: str | Path) -> None:
    """Write every field of ``config``, defaults included, as YAML that :func:`load` reads back."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_private(Path(path), to_yaml(config))


def to_yaml(config: Section) -> str:
    """The resolved configuration as YAML, in the order in which the fields are declared."""
    return written(config.model_dump(mode="json"))


def _read(path: Path, kind: type[Section]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"config: file {path} not found; accepted: a YAML file")
    try:
        data = parse_document(read_text(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: found {_shown(data)}, accepted: a mapping with the keys {_listed(kind)}")
    return data


def _move(data: dict[str, Any], moved: Mapping[str, str], source: str | Path | None = None) -> dict[str, str]:
    """Move settings of ``data`` from old places to new ones; return the old and new keys of those moved.

    ``source``: raise ``ValueError`` where it gives both. None: the old place holds an override, which wins.
    """
    found = {}
    for old, new in moved.items():
        (*sections, key), (*new_sections, new_key) = old.split("."), new.split(".")
        node: Any = data
        for part in sections:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or key not in node:
            continue
        found[old], value = new, node.pop(key)
        node = data
        for part in new_sections:
            if isinstance(node, dict):  # anything else is an error, which validation reports later
                node[part] = {} if node.get(part) is None else node[part]
                node = node[part]
        if source is not None and isinstance(node, dict) and new_key in node:
            raise ValueError(
                f"{old}: found beside {new}, its new name; accepted: the new one (from {source})"
            )
        if isinstance(node, dict):
            node[new_key] = value
    return found


def _refuse_both(overrides: Sequence[str], moved: Mapping[str, str]) -> None:
    """``ValueError`` where overrides give a setting by its old and by its new name."""
    by_key = {override.partition("=")[0].strip(): override for override in overrides}
    for old, new in moved.items():
        if old in by_key and new in by_key:
            raise ValueError(
                f"{old}: found beside {new}, its new name; accepted: the new one (from override "
                f"{by_key[old]!r})"
            )


def _apply(data: dict[str, Any], override: str) -> Location:
    """Set one override in ``data`` and return the place that it set."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or key.startswith("-"):
        raise ValueError(
            f"override {_said(override)}: accepted: key=value or key.sub=value, such as optimizer.lr=1e-6"
        )
    try:
        value = parse_value(text)
    except ValueError as error:
        raise ValueError(
            f"override {_said(override)}: value not readable as YAML: {error}; accepted: one value and "
            "nothing after it (a text that begins with [ { \" ' or ! needs quotes)"
        ) from None
    node: Any = data
    location: list[int | str] = []
    for depth, part in enumerate(parts):
        step = _step(node, part, override, _dotted(parts[:depth]))
        location.append(step)
        if depth == len(parts) - 1:
            node[step] = value
        elif isinstance(step, str) and node.get(step) is None:
            node[step] = {}
        node = node[step]
    return tuple(location)


def _step(node: Any, part: str, override: str, where: str) -> int | str:
    """``part`` as a key or an index of ``node``."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list):
        if _INDEX.fullmatch(part) and int(part) < len(node):
            return int(part)
        accepted = f"an index from 0 to {len(node) - 1}" if node else "none"
        raise ValueError(
            f"{_dotted([where, part])}: {where} has {len(node)} items, accepted: {accepted}; a longer one "
            f"is given as a whole (from override {_said(override)})"
        )
    raise ValueError(
        f"{where}: found {_shown(node)}, which has no parts to set (from override {_said(override)})"
    )


def _refuse_unusable(data: Any, applied: Sequence[tuple[Location, str]], source: str | Path) -> None:
    """``ValueError`` for the first number of ``data`` that no type holds, or text that no file can hold."""
    unusable = first_unusable(data)
    if unusable is not None:
        location, found, accepted = unusable
        origin = _origin(location, applied, source).encode("ascii", "backslashreplace").decode()
        raise ValueError(f"{_dotted(location)}: found {found}, accepted: {accepted} ({origin})")


def _refuse_written_out(data: Any, applied: Sequence[tuple[Location, str]], source: str | Path) -> None:
    """``ValueError`` for the first credential of ``data``, which says neither it nor its override."""
    found = first_written_out(data)
    if found is not None:
        location, what, accepted = found
        keys = [(place, f"{override.partition('=')[0]}={HIDDEN}") for place, override in applied]
        origin = _origin(location, keys, source)
        raise ValueError(f"{_dotted(location)}: found {what}, accepted: {accepted} ({origin})")


def explain(error: ValidationError, kind: type[Section]) -> tuple[str, Location]:
    """One line about pydantic's most telling complaint, and its location."""
    details = error.errors(include_url=False)
    # A misspelled key often causes a "missing" elsewhere, so it comes first.
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    # A value of one of several types has a complaint of each. One about an item of it knows the type that was
    # meant; without such a one they say together what is accepted.
    around = _place(first)
    items = (d for d in details if _place(d) != around and _place(d)[: len(around)] == around)
    first = next(items, first)
    place = _place(first)
    same = [d for d in details if _place(d) == place]
    rest = sum(_place(d) not in (place, around) for d in details)
    more = f"; {rest} more after this one" if rest else ""
    return " or ".join([_sentence(first, kind), *map(_accepted, same[1:])]) + more, place


def _place(detail: ErrorDetails) -> Location:
    """The location without the types that pydantic tried; an unknown key may look like one."""
    *parts, last = detail["loc"] or ("",)
    unknown = detail["type"] == "extra_forbidden"
    given = parts if unknown else detail["loc"]
    found = [part for part in given if isinstance(part, int) or not _TYPE.search(part)]
    return (*found, last) if unknown else tuple(found)


def _said(override: str) -> str:
    """An override as an error repeats it."""
    key, equals, _ = override.partition("=")
    secret = equals and names_a_secret(key.strip())
    return shown(f"{key}={HIDDEN}" if secret else without_password(override), _LONGEST_PATH)


def _dotted(location: Sequence[object]) -> str:
    """The path that errors show: on one line, also where a key is not."""
    return shown_name(".".join(map(str, location)), _LONGEST_PATH)


def _sentence(detail: ErrorDetails, kind: type[Section]) -> str:
    location = _place(detail)
    path = _dotted(location)
    if detail["type"] == "extra_forbidden":
        section = _section(location[:-1], kind)
        name = str(location[-1])
        near = difflib.get_close_matches(name, list(section.model_fields), n=1, cutoff=0.0)[0]
        return f"{path}: unknown key, the nearest is {near!r}; accepted: {_listed(section)}"
    if detail["type"] == "missing":
        field = _section(location[:-1], kind).model_fields[str(location[-1])]
        meaning = f" ({field.description})" if field.description else ""
        return f"{path}: not given, accepted: a value{meaning}"
    if detail["type"] == "value_error":
        message = str(detail["msg"]).removeprefix("Value error, ")
        outer = _dotted(location[:-1])
        # Validators of a section name their own keys; a nested section gets its path in front.
        return f"in {path}: {message}" if outer else message
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"{path or 'config'}: found {_shown(detail['input'])}, accepted: a mapping with the keys " + (
            _listed(_section(location, kind))
        )
    return f"{path or 'config'}: found {_shown(detail['input'])}, accepted: {_accepted(detail)}"


def _accepted(detail: ErrorDetails) -> str:
    message = str(detail["msg"])
    for beginning in ("Input should be ", "String should ", "List should have "):
        message = message.removeprefix(beginning)
    return message


def _section(location: Location, kind: type[Section]) -> type[BaseModel]:
    """The section class that lies at ``location`` of the schema of ``kind``."""
    section: type[BaseModel] = kind
    for part in location:
        if isinstance(part, int):
            continue  # an item of the list whose item type was already taken
        annotation = section.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        section = next(c for c in candidates if is_subclass(c, BaseModel))
    return section


def _listed(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)


def _shown(value: Any) -> str:
    """A value as an error shows it: short, on one line."""
    if isinstance(value, dict):
        return "a mapping"
    if value is None:
        return "nothing"
    return shown(value)


def _origin(location: Location, applied: Sequence[tuple[Location, str]], path: str | Path) -> str:
    """The last override that set ``location``, a part of it or something around it; else the file."""
    if not location and applied:
        return f"from {path} and its overrides"  # a check over several keys: any of them may be the cause
    for place, override in reversed(applied):
        shared = min(len(place), len(location))
        if place[:shared] == location[:shared]:
            return f"from override {_said(override)}"
    return f"from {path}"
