"""The architecture, kept by a test: who may import whom, and how long a file may be.

    cli -> trainer -> its parts -> {rollout, supervised, evaluation, engine} -> engine.base
        -> {aggregation, objectives, losses, advantages, models} -> ops -> {types, config, ...}

Imports point down and siblings do not import each other. Megatron is imported below
engine/megatron only, the compiled extension below ops only. Imports inside functions and under
``if TYPE_CHECKING`` count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gapo_mega"
COMPILED = f"{PACKAGE}.ops._native"
MEGATRON_HOME = f"{PACKAGE}.engine.megatron"
LONGEST_FILE = 450

# From the top down. A unit may import units of lower layers only.
LAYERS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"trainer"},
    {
        "activation_plan",
        "checkpoints",
        "conversion",
        "finish",
        "heldout",
        "layout_checks",
        "memory_plan",
        "plan_report",
        "preflight",
        "reward_server",
        "run_logging",
        "step_benchmark",
        "step_benchmark_report",
        "supervised_training",
        "throughput_report",
    },
    {"rollout", "supervised", "evaluation", "engine"},
    {"engine.base"},  # the protocol that the layer above shares
    {"aggregation", "objectives", "losses", "advantages", "models"},
    {"ops"},
]
# What is in no layer is at the bottom: types, config and the small modules about them, which may
# import each other but nothing above.
BOTTOM = len(LAYERS)
# The single files that the trainer is made of, and those at the bottom, are no siblings.
MAY_IMPORT_EACH_OTHER = (3, BOTTOM)


@dataclass(frozen=True)
class Import:
    """``source`` imports ``target``; both are dotted names."""

    source: str
    target: str
    line: int


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(code: str, source: str, is_package: bool) -> Iterator[Import]:
    """Every import statement, relative ones resolved, and ``import_module("...")`` with a literal."""
    package = source if is_package else source.rpartition(".")[0]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:  # `from package import module` imports the module
                yield Import(source, f"{base}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
            argument = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(argument, str):
                yield Import(source, argument, node.lineno)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def unit_of(name: str) -> str:
    """``gapo_mega.engine.base.Layout`` -> ``engine.base``; ``gapo_mega.ops.reference`` -> ``ops``."""
    parts = name.split(".")[1:]
    return "engine.base" if parts[:2] == ["engine", "base"] else (parts[0] if parts else "")


def layer_of(unit: str) -> int:
    return next((i for i, units in enumerate(LAYERS) if unit in units), BOTTOM)


def violation(found: Import) -> str | None:
    """What is wrong with an import, or None."""
    where = f"{found.source}:{found.line} imports {found.target}"
    if within(found.target, "megatron") and not within(found.source, MEGATRON_HOME):
        return f"{where}: megatron is imported below {MEGATRON_HOME} only"
    if within(found.target, COMPILED) and not within(found.source, f"{PACKAGE}.ops"):
        return f"{where}: the compiled extension is imported below {PACKAGE}.ops only"
    if not within(found.target, PACKAGE) or found.target == PACKAGE or found.source == PACKAGE:
        return None
    source, target = unit_of(found.source), unit_of(found.target)
    if source == target:
        return None
    upper, lower = layer_of(source), layer_of(target)
    if upper < lower or (upper == lower and upper in MAY_IMPORT_EACH_OTHER):
        return None
    relation = "siblings do not import each other" if upper == lower else "imports point down"
    return f"{where}: {relation} ({source} is in layer {upper}, {target} in layer {lower})"


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = module_name(path, root)
        for statement in imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py"):
            wrong = violation(statement)
            if wrong is not None:
                found.append(wrong)
    return found


def long_files(root: Path) -> list[str]:
    found = []
    for folder in (PACKAGE, "csrc", "tools", "examples", "benchmarks", "tests"):
        for pattern in ("*.py", "*.cpp", "*.cu", "*.h", "*.cuh", "*.inl"):
            for path in sorted((root / folder).rglob(pattern)):
                lines = len(path.read_text(encoding="utf-8").splitlines())
                if lines > LONGEST_FILE:
                    found.append(f"{path.relative_to(root)}: {lines} lines, accepted: at most {LONGEST_FILE}")
    return found


def test_imports_keep_to_the_architecture() -> None:
    assert violations(ROOT) == []


def test_no_file_is_long() -> None:
    assert long_files(ROOT) == []


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("trainer.py", "import megatron.core", "megatron is imported below"),
        ("engine/base.py", "from megatron.core import parallel_state", "megatron is imported below"),
        ("models/llama.py", "def f():\n    import megatron", "megatron is imported below"),
        (
            "rollout/x.py",
            "import importlib\nimportlib.import_module('megatron.core')",
            "megatron is imported",
        ),
        ("aggregation/x.py", "from gapo_mega.ops import _native", "compiled extension"),
        ("engine/megatron/x.py", "import gapo_mega.ops._native as native", "compiled extension"),
        ("aggregation/x.py", "from gapo_mega.losses.ppo import policy_loss_sum", "siblings"),
        ("rollout/x.py", "from gapo_mega.engine.megatron import build", "siblings"),
        ("losses/x.py", "from ..advantages import gae", "siblings"),
        ("supervised/x.py", "from gapo_mega.data.prompts import load_prompts", "siblings"),
        ("tables.py", "from gapo_mega.data.pairs import Pair", "imports point down"),
        ("ops/x.py", "from gapo_mega.aggregation import build", "imports point down"),
        ("types.py", "from gapo_mega import ops", "imports point down"),
        ("config.py", "from .aggregation.registry import methods", "imports point down"),
        ("losses/x.py", "from gapo_mega.engine.base import PolicyLoss", "imports point down"),
        ("rollout/x.py", "from gapo_mega.runs.checkpoints import CheckpointFolder", "imports point down"),
        ("engine/x.py", "if TYPE_CHECKING:\n    import gapo_mega.runs.trainer", "imports point down"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str, message: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    (found,) = violations(tmp_path)
    assert message in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "engine/megatron/x.py",
            "from megatron.core import parallel_state\nfrom gapo_mega.ops import gramian",
        ),
        (
            "ops/x.py",
            "from gapo_mega.ops import _native\nfrom . import reference\nfrom ..types import Experience",
        ),
        (
            "rollout/x.py",
            "from gapo_mega.engine.base import Generator\nfrom gapo_mega.objectives import build",
        ),
        (
            "supervised/x.py",
            "from gapo_mega.data.tables import read_rows\nfrom gapo_mega.types import Message",
        ),
        ("trainer.py", "import gapo_mega.engine.megatron.model.build\nimport megatronic"),
        ("aggregation/__init__.py", "from .base import Aggregator\nfrom gapo_mega.aggregation import gapo"),
        (
            "finish.py",
            "from gapo_mega.rollout.heldout import HeldOut\nfrom gapo_mega.evaluation import report",
        ),
        ("config_loading.py", "from gapo_mega.config import Config"),
    ],
)
def test_right_imports_are_left_alone(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == []


def test_a_long_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / PACKAGE / "x.py"
    path.parent.mkdir()
    path.write_text("\n" * (LONGEST_FILE + 1))
    assert len(long_files(tmp_path)) == 1
