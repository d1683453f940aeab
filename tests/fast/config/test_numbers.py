"""Numbers that a later stage could not hold are refused where the configuration is read."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from gapo_mega.config import Config, ObjectiveConfig
from gapo_mega.config.fields import LARGEST_INTEGER, LARGEST_NUMBER
from gapo_mega.config.loading import load, parse
from gapo_mega.config.optimizer import SMALLEST_NORMAL
from gapo_mega.config.supervised import SftConfig

BASE = "output_dir: o\nmodel: {path: m}\ndata: {source: s}\nobjectives: [{name: a, function: 'a:b'}]\n"
WIDE = [LARGEST_INTEGER + 1, -LARGEST_INTEGER - 1, 9_000_000_000_001, 2**63, 10**400, -(10**400)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def numeric_fields(kind: type[float]) -> list[str]:
    """Dotted names of the fields of a training that take a number of this type."""
    found = []
    for name, field in Config.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
            inner = annotation.model_fields.items()
            found += [
                f"{name}.{key}" for key, one in inner if kind in (one.annotation, *get_args(one.annotation))
            ]
        elif annotation is kind:
            found.append(name)
    return found


INTEGERS, NUMBERS = numeric_fields(int), numeric_fields(float)


def test_the_fields_are_found() -> None:
    assert {"seed", "steps", "rollout.max_new_tokens", "checkpoint.every_steps"} <= {*INTEGERS}
    assert {"optimizer.lr", "optimizer.eps", "algorithm.kl_beta", "rollout.temperature"} <= {*NUMBERS}


@pytest.mark.parametrize("name", INTEGERS)
def test_whole_numbers_beyond_32_bits_are_refused_by_name(file: Path, name: str) -> None:
    for value in WIDE:
        with pytest.raises(ValueError, match=rf"^{name}: found -?\d+.*, accepted: ") as raised:
            load(file, [f"{name}={value}"])
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1e39", "-1e300", ".inf", "-.inf", ".nan", "1e999", "0x" + "f" * 5000])
def test_numbers_beyond_float32_are_refused_by_name(file: Path, name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: found ") as raised:
        load(file, [f"{name}={value}"])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_what_is_accepted_is_held_by_what_uses_it(file: Path) -> None:
    for seed in (LARGEST_INTEGER, -LARGEST_INTEGER, 20251129):
        assert load(file, [f"seed={seed}"]).seed == seed
        torch.Generator().manual_seed(seed * 1_000_003 + LARGEST_INTEGER)  # as a step seeds its own
    assert torch.tensor(LARGEST_NUMBER, dtype=torch.float32).isfinite()
    assert load(file, [f"optimizer.eps={SMALLEST_NORMAL}"]).optimizer.eps == torch.finfo(torch.float32).tiny
    with pytest.raises(ValueError, match=r"^optimizer\.eps: found 1e-46, accepted: at least 1\.18e-38"):
        load(file, ["optimizer.eps=1e-46"])  # 0 in float32


@pytest.mark.parametrize("value", [2**63, -(10**400), "0x" + "f" * 5000])
def test_options_of_methods_hold_64_bits(file: Path, value: object) -> None:
    for name in ("aggregation.options.x", "loss.options.x", "objectives.0.options.x"):
        with pytest.raises(ValueError, match=rf"^{name}: found .*, accepted: a whole number of 64 bits"):
            load(file, [f"{name}={value}"])
    assert load(file, [f"objectives.0.options.x={2**63 - 1}"]).objectives[0].options == {"x": 2**63 - 1}


def test_other_commands_have_the_same_limits(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("output_dir: o\nmodel: {path: m}\ndata: {source: s}\n")
    with pytest.raises(ValueError, match=r"^seed: found 9000000000001, accepted: a whole number from"):
        load(path, ["seed=9000000000001"], kind=SftConfig)
    with pytest.raises(ValueError, match=r"^clip: found 1e\+39, accepted: a number from"):
        load(_write(tmp_path, "name: a"), ["clip=1e39"], kind=ObjectiveConfig)


def _write(folder: Path, text: str) -> Path:
    (folder / "objective.yaml").write_text(text)
    return folder / "objective.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("? [a, b]\n: 1\n", r"line 1: found a sequence as key, accepted: a text"),
        ("? {a: b}\n: 1\n", r"line 1: found a mapping as key, accepted: a text"),
        ("[a, b]: 1\n", r"line 1: found a sequence as key"),
        ("x: " + "[" * 45 + "]" * 45, r"found lists or mappings more than 40 deep within each other"),
        ("x: " + "[" * 5000 + "]" * 5000, r"found lists or mappings .*deep within each other"),
        ("x: " + "{a: " * 5000 + "1" + "}" * 5000, r"found lists or mappings .*deep within each other"),
        ("x: 1" + "0" * 5000, r"line 1: found an integer of 5001 digits, accepted: fewer"),
    ],
)
def test_deep_and_strange_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_an_override_below_others_is_no_deeper_than_a_file() -> None:
    """Each is within the limit; together they would make a config.yaml that cannot be read again."""
    data = {"objectives": [{"name": "a", "options": {"x": 1}}]}
    value = "[" * 38 + "]" * 38
    with pytest.raises(ValueError, match=r"^test: found lists or mappings more than 40 deep"):
        parse(data, [f"objectives.0.options.x={value}"], Config, "test")
