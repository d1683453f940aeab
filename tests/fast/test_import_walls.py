"""The architecture, kept by a test: who may import whom, what lies where, and how long a file may be.

``LAYERS`` has the order, which docs/architecture.md draws. Imports point down, and siblings do not import
each other, but for those on the lowest level. Megatron is imported below engine/megatron only, the compiled
extension below ops only. Outside the engine's folder only engine/base.py is imported, which makes engines
inside its functions. Imports inside functions and under ``if TYPE_CHECKING`` count like all others.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.imports import Import, circles, imports_in, within

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gapo_mega"
COMPILED = f"{PACKAGE}.ops._native"
ENGINE = f"{PACKAGE}.engine"
ENGINE_BASE = f"{ENGINE}.base"
MEGATRON_HOME = f"{ENGINE}.megatron"
LONGEST_FILE = 400

# From the top down. A unit may import units of lower layers only.
LAYERS: list[set[str]] = [
    {"cli"},
    {"commands"},
    {"runs"},
    {"measuring"},
    {"rollout", "evaluation", "engine"},
    {"engine.base"},  # the protocols that the layers above share
    {"planning"},
    {"scalarization"},
    {"aggregation", "objectives", "losses", "advantages"},
    {"models", "data"},
    {"ops"},
    {
        "types",
        "config",
        "credentials",
        "registry",
        "optional",
        "option_checks",
        "files",
        "progress",
        "scratch",
        "stopping",
        "user_code",
        "versions",
        "whereabouts",
        "demo",
    },
]
# Those at the bottom may import each other but nothing above.
BOTTOM = len(LAYERS) - 1
ROOT_FILES = {
    "__init__.py",
    "cli.py",
    "credentials.py",
    "types.py",
    "registry.py",
    "optional.py",
    "option_checks.py",
    "files.py",
    "progress.py",
    "scratch.py",
    "stopping.py",
    "user_code.py",
    "versions.py",
    "whereabouts.py",
    "py.typed",
}

# Folders of tests/{fast,engine,process} that mirror something else than gapo_mega/FOLDER.
MIRRORED = {
    "megatron": "gapo_mega/engine/megatron",
    "benchmarks": "benchmarks",
    "docs": "docs",
    "examples": "examples",
    "tools": "tools",
    "combinations": "tests/helpers/combinations",
    "kills": "tests/helpers/kills",
}
KINDS_OF_TESTS = ("fast", "engine", "process")


def unit_of(name: str) -> str:
    """``gapo_mega.engine.base.Layout`` -> ``engine.base``; ``gapo_mega.ops.reference`` -> ``ops``."""
    parts = name.split(".")[1:]
    return "engine.base" if parts[:2] == ["engine", "base"] else (parts[0] if parts else "")


def layer_of(unit: str) -> int | None:
    return next((i for i, units in enumerate(LAYERS) if unit in units), None)


def violation(found: Import) -> str | None:
    """What is wrong with an import, or None."""
    if within(found.target, "megatron") and not within(found.source, MEGATRON_HOME):
        return f"{found}: megatron is imported below {MEGATRON_HOME} only"
    if within(found.target, COMPILED) and not within(found.source, f"{PACKAGE}.ops"):
        return f"{found}: the compiled extension is imported below {PACKAGE}.ops only"
    if not within(found.target, PACKAGE) or found.target == PACKAGE or found.source == PACKAGE:
        return None
    source, target = unit_of(found.source), unit_of(found.target)
    if source == target or target.startswith("__"):  # a name of the package itself, such as __version__
        return None
    if target == "engine" and source != "engine":
        if source == "engine.base" and found.inside_a_function:
            return None
        return f"{found}: outside the engine's folder only {ENGINE_BASE} is imported"
    upper, lower = layer_of(source), layer_of(target)
    if upper is None or lower is None:
        return f"{found}: {source if upper is None else target} is no room of the package"
    if upper < lower or upper == lower == BOTTOM:
        return None
    relation = "siblings do not import each other" if upper == lower else "imports point down"
    return f"{found}: {relation} ({source} is in layer {upper}, {target} in layer {lower})"


def violations(root: Path) -> list[str]:
    found = []
    for imports in imports_in(root / PACKAGE, root).values():
        for each in imports:
            wrong = violation(each)
            if wrong is not None:
                found.append(wrong)
    return found


def package_circles(root: Path) -> list[str]:
    """The factories of engine/base.py do not count: they run when all modules are there."""
    imports = imports_in(root / PACKAGE, root)
    return circles(
        {
            name: [each for each in found if name != ENGINE_BASE or not each.inside_a_function]
            for name, found in imports.items()
        }
    )


def homeless(root: Path) -> list[str]:
    """Files and folders of the package's root that do not belong there."""
    found = []
    for path in sorted((root / PACKAGE).iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        known = path.name in ROOT_FILES if path.is_file() else layer_of(path.name) is not None
        if not known:
            found.append(str(path.relative_to(root)))
    return found


def imported_tests(root: Path) -> list[str]:
    """Imports from tests/ of something else than tests/helpers."""
    return [
        f"{each}: what tests share is in tests.helpers"
        for found in imports_in(root / "tests", root).values()
        for each in found
        if within(each.target, "tests") and not within(each.target, "tests.helpers")
    ]


def unmirrored(root: Path) -> list[str]:
    """Folders of tests that are named like no folder of the package."""
    found = []
    for kind in KINDS_OF_TESTS:
        base = root / "tests" / kind
        for folder in sorted({path.parent for path in base.rglob("test_*.py")} - {base}):
            first, *rest = folder.relative_to(base).parts
            mirrored = root.joinpath(MIRRORED.get(first, f"{PACKAGE}/{first}"), *rest)
            if not mirrored.is_dir():
                found.append(f"{folder.relative_to(root)}: there is no {mirrored.relative_to(root)}")
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


def test_nothing_is_imported_in_a_circle() -> None:
    assert package_circles(ROOT) == []
    # The scripts of benchmarks/ find each other in their own folder.
    assert circles(imports_in(ROOT / "benchmarks", ROOT / "benchmarks")) == []
    assert circles(imports_in(ROOT / "tests" / "helpers", ROOT)) == []


def test_the_package_s_root_holds_rooms_and_little_else() -> None:
    assert homeless(ROOT) == []


def test_no_test_file_is_imported() -> None:
    assert imported_tests(ROOT) == []


def test_tests_mirror_the_package() -> None:
    assert unmirrored(ROOT) == []


def test_no_file_is_long() -> None:
    assert long_files(ROOT) == []


# -- that each of them finds something -----------------------------------------------------------------


def write(root: Path, file: str, code: str = "") -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)


LAZY = "def f():\n    from gapo_mega.engine.megatron import engine"


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("runs/x.py", "import megatron.core", "megatron is imported below"),
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
        ("rollout/x.py", "from gapo_mega.evaluation import report", "siblings"),
        ("losses/x.py", "from ..advantages import gae", "siblings"),
        ("data/x.py", "from gapo_mega.models import shape_of", "siblings"),
        ("runs/x.py", "from gapo_mega.engine.megatron import build", "only gapo_mega.engine.base"),
        ("runs/x.py", LAZY, "only gapo_mega.engine.base"),
        ("rollout/x.py", "from gapo_mega import engine", "only gapo_mega.engine.base"),
        ("engine/base.py", "from .megatron import engine", "only gapo_mega.engine.base"),
        ("engine/base.py", "if TYPE_CHECKING:\n    from .megatron import engine", "only gapo_mega.engine"),
        ("ops/x.py", "from gapo_mega.aggregation import build", "imports point down"),
        ("types.py", "from gapo_mega import ops", "imports point down"),
        ("config/x.py", "from ..aggregation.registry import methods", "imports point down"),
        ("losses/x.py", "from gapo_mega.engine.base import PolicyLoss", "imports point down"),
        ("rollout/x.py", "from gapo_mega.runs.checkpoints import CheckpointFolder", "imports point down"),
        ("measuring/x.py", "def f():\n    from gapo_mega.runs import log", "imports point down"),
        (
            "engine/megatron/x.py",
            "if TYPE_CHECKING:\n    import gapo_mega.runs.trainer",
            "imports point down",
        ),
        ("runs/x.py", "from gapo_mega.commands.launch import start", "imports point down"),
        ("runs/x.py", "from gapo_mega.utils import helper", "utils is no room"),
        ("utils/x.py", "from gapo_mega.types import Prompt", "utils is no room"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str, message: str) -> None:
    write(tmp_path / PACKAGE, file, code)
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
        ("engine/base.py", LAZY),
        ("engine/megatron/x/y.py", "from gapo_mega.engine.megatron.model import build\nimport megatron"),
        ("objectives/x.py", "from gapo_mega.data.chat_template import template_text"),
        ("runs/x.py", "from gapo_mega.engine import base\nimport megatronic"),
        ("aggregation/__init__.py", "from .base import Aggregator\nfrom gapo_mega.aggregation import gapo"),
        (
            "runs/x.py",
            "from gapo_mega.rollout.heldout import HeldOut\nfrom gapo_mega.evaluation import report",
        ),
        ("commands/x.py", "from gapo_mega import __version__\nfrom gapo_mega.commands import launch"),
        ("config/loading.py", "from gapo_mega.config import Config\nfrom gapo_mega.types import Prompt"),
    ],
)
def test_right_imports_are_left_alone(tmp_path: Path, file: str, code: str) -> None:
    write(tmp_path / PACKAGE, file, code)
    assert violations(tmp_path) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    write(tmp_path, "gapo_mega/runs/a.py", "def f():\n    from gapo_mega.runs import b")
    write(tmp_path, "gapo_mega/runs/b.py", "from .c import d")
    write(tmp_path, "gapo_mega/runs/c.py", "if TYPE_CHECKING:\n    import gapo_mega.runs.a")
    write(tmp_path, "gapo_mega/runs/d.py", "from gapo_mega.runs import a\nfrom gapo_mega.runs.e import f")
    write(tmp_path, "gapo_mega/runs/e.py", "import gapo_mega.types")
    assert package_circles(tmp_path) == [f"gapo_mega.runs.{name}" for name in "abc"]


def test_a_name_of_the_own_package_is_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "gapo_mega/losses/__init__.py", "from gapo_mega.losses.registry import build")
    write(tmp_path, "gapo_mega/losses/registry.py", "import gapo_mega.losses as package")
    assert package_circles(tmp_path) == []
    write(tmp_path, "gapo_mega/losses/registry.py", "from gapo_mega.losses import build")
    assert package_circles(tmp_path) == ["gapo_mega.losses", "gapo_mega.losses.registry"]


def test_only_factories_close_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "gapo_mega/engine/megatron/engine.py", "from gapo_mega.engine.base import Layout")
    write(tmp_path, "gapo_mega/engine/base.py", LAZY)
    assert package_circles(tmp_path) == []
    write(tmp_path, "gapo_mega/engine/base.py", "from gapo_mega.engine.megatron import engine")
    assert len(package_circles(tmp_path)) == 2


def test_what_lies_in_the_package_s_root_is_found(tmp_path: Path) -> None:
    for file in ("__init__.py", "cli.py", "helpers.py", "py.typed", "runs/log.py", "misc/x.py"):
        write(tmp_path / PACKAGE, file)
    assert homeless(tmp_path) == ["gapo_mega/helpers.py", "gapo_mega/misc"]


def test_an_imported_test_file_is_found(tmp_path: Path) -> None:
    write(tmp_path, "tests/fast/test_a.py", "from tests.helpers.tiny import tiny_llama")
    write(tmp_path, "tests/fast/test_b.py", "from tests.fast.test_a import make")
    write(tmp_path, "tests/fast/test_c.py", "from .test_a import make")
    assert len(imported_tests(tmp_path)) == 2


def test_a_folder_without_its_like_is_found(tmp_path: Path) -> None:
    (tmp_path / "gapo_mega" / "engine" / "megatron" / "model").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    for folder in ("engine/megatron/model", "fast/benchmarks", "fast/megatron/other", "process/old", "fast"):
        write(tmp_path / "tests", f"{folder}/test_x.py")
    assert [line.split(":")[0] for line in unmirrored(tmp_path)] == [
        "tests/fast/megatron/other",
        "tests/process/old",
    ]


def test_a_long_file_is_found(tmp_path: Path) -> None:
    write(tmp_path / PACKAGE, "x.py", "\n" * (LONGEST_FILE + 1))
    assert len(long_files(tmp_path)) == 1
