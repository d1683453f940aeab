"""Code of the user's own: where it is looked for, what is loaded, and that every mistake is told."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gapo_mega import advantages, aggregation, losses, objectives
from gapo_mega.aggregation import Aggregator, HostMethod, Solution
from gapo_mega.commands.reward_server import objective_config
from gapo_mega.config import ObjectiveConfig
from gapo_mega.config.loading import dump, load
from gapo_mega.types import Prompt
from gapo_mega.user_code import is_subclass, load_class, load_function, resolve

AGGREGATOR = """
from dataclasses import dataclass
from gapo_mega.aggregation.on_host import HostMethod, Solution

class Odd(ValueError):
    pass

@dataclass(kw_only=True)
class Fixed(HostMethod):
    first: float = 2.0

    def solve(self, gram, active):
        return Solution(gram.diagonal() * 0 + self.first)

class Needy(Fixed):
    def __init__(self, first):
        super().__init__(first=first)

class Half(HostMethod):
    pass

def helper():
    import neighbour_of_mine
    return neighbour_of_mine.VALUE

NUMBER = 3
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a file below ``tmp_path``; modules and paths that a test brings in go with it."""
    modules, path = set(sys.modules), list(sys.path)

    def file(name: str, text: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    yield file
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def config_file(write: Write, name: str = "runs/run.yaml", aggregator: str = "mine.py:Fixed") -> Path:
    return write(
        name,
        f"""
output_dir: o
model: {{path: m}}
data: {{source: s}}
objectives:
  - {{name: a, function: "rewards.py:length"}}
  - {{name: b, kind: "pkg.kinds:Mine"}}
  - {{name: c, function: "gapo_mega.demo.rewards:plain"}}
aggregation: {{name: "{aggregator}"}}
""",
    )


def test_files_are_looked_for_here_and_then_beside_the_configuration(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(write)
    here, beside = tmp_path / "here", path.parent
    for name in ("here/mine.py", "runs/mine.py", "runs/rewards.py", "runs/pkg/kinds.py"):
        write(name, "")
    monkeypatch.chdir(here)
    for given in (path, Path(os.path.relpath(path))):
        config = load(given)
        assert config.aggregation.name == f"{here}/mine.py:Fixed"
        assert [o.function for o in config.objectives] == [
            f"{beside}/rewards.py:length",
            None,
            "gapo_mega.demo.rewards:plain",
        ]
        assert config.objectives[1].kind == f"{beside}/pkg/kinds.py:Mine"
        assert (config.advantages.name, config.loss.name) == ("group", "ppo")
    (here / "mine.py").unlink()
    assert load(path).aggregation.name == f"{beside}/mine.py:Fixed"
    assert load(path, ["aggregation.name=pkg/kinds.py:X"]).aggregation.name == f"{beside}/pkg/kinds.py:X"


def test_what_a_run_records_is_loaded_from_anywhere(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(write)
    for name in ("runs/mine.py", "runs/rewards.py", "runs/pkg/kinds.py"):
        write(name, AGGREGATOR)
    config = load(path)
    dump(config, tmp_path / "elsewhere" / "config.yaml")
    monkeypatch.chdir("/")
    again = load(tmp_path / "elsewhere" / "config.yaml")
    assert again == config
    assert aggregation.build(again.aggregation.name)(torch.eye(2)).tolist() == [2.0, 2.0]


def test_a_module_of_python_comes_before_a_file_of_that_name(write: Write, tmp_path: Path) -> None:
    write("json.py", "")
    write("no_module_of_python.py", "")
    assert resolve("json:loads", [tmp_path]) == "json:loads"
    assert resolve("no_module_of_python:f", [tmp_path]) == f"{tmp_path}/no_module_of_python.py:f"
    assert resolve("nowhere.at.all:f", [tmp_path]) == "nowhere.at.all:f"
    assert resolve("gapo", [tmp_path]) == "gapo"


def test_the_working_directory_on_the_path_makes_no_difference(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` and torchrun put it there, the console script does not."""
    write("only_here.py", "")
    write("folder_here/inner.py", "")
    monkeypatch.chdir(tmp_path)
    wanted = [f"{tmp_path}/only_here.py:f", f"{tmp_path}/folder_here/inner.py:f"]

    def found() -> list[str]:
        return [resolve(name, [tmp_path]) for name in ("only_here:f", "folder_here.inner:f")]

    assert found() == wanted
    for first in (str(tmp_path), ""):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [first, *sys.path])
            assert importlib.util.find_spec("only_here") is not None
            assert found() == wanted
    monkeypatch.setattr(sys, "path", ["elsewhere", str(tmp_path), *sys.path])  # as PYTHONPATH does
    assert found() == ["only_here:f", "folder_here.inner:f"]


def test_a_file_that_is_nowhere_is_refused_when_the_configuration_is_read(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(write, aggregator="mien.py:Fixed")
    write("runs/rewards.py", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value) == (
        f"aggregation.name: found 'mien.py:Fixed', accepted: an absolute path, or a file in {tmp_path} or in "
        f"{tmp_path}/runs (from {path})"
    )


def test_the_same_file_is_the_same_module(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python has another module of its name, and for a path that is written differently."""
    for name in ("trial_mine.py", "json.py", "not-a-name.py"):
        path = write(f"files/{name}", AGGREGATOR)
        first = load_class("x", f"{path}:Fixed", Aggregator)
        monkeypatch.chdir(path.parent)
        for again in (f"{name}:Fixed", f"{path.parent}/../files/{name}:Fixed"):
            assert load_class("x", again, Aggregator) is first
        assert importlib.util.find_spec("json") == sys.modules["json"].__spec__
        odd = sys.modules[first.__module__].Odd("text")
        assert isinstance(pickle.loads(pickle.dumps(odd)), type(odd))


def test_a_file_may_import_its_neighbours_and_its_package(write: Write) -> None:
    write("plain/neighbour_of_mine.py", "VALUE = 7")
    path = write("plain/mine_plain.py", "from neighbour_of_mine import VALUE\n" + AGGREGATOR)
    assert load_function("x", f"{path}:helper")() == 7
    write("trial_package/__init__.py", "")
    write("trial_package/inner/__init__.py", "")
    write("trial_package/common.py", "VALUE = 8")
    path = write("trial_package/inner/mine.py", "from ..common import VALUE\ndef f(): return VALUE\n")
    assert load_function("x", f"{path}:f")() == 8
    assert load_function("x", f"{path}:f") is load_function("x", "trial_package.inner.mine:f")


def test_every_kind_can_be_of_the_users_own(write: Write) -> None:
    path = write(
        "kinds.py",
        AGGREGATOR
        + """
from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.losses.base import PolicyLoss
from gapo_mega.objectives.base import ObjectiveKind

class Estimator(AdvantageEstimator):
    needs_values = False
    def __call__(self, experience):
        return experience

class Loss(PolicyLoss):
    def __call__(self, logprobs_BT, batch, objective):
        return logprobs_BT.sum()

class Kind(ObjectiveKind):
    def evaluate(self, prompts, responses):
        return [self.config.options["value"]] * len(responses)
""",
    )
    fixed = aggregation.build(f"{path}:Fixed", first=0.5, scale="none")
    assert fixed(torch.eye(3)).tolist() == [0.5, 0.5, 0.5]
    assert fixed.name == "Fixed"  # without a name of its own it is called as its class
    with pytest.raises(ValueError, match="aggregation Fixed: found state"):
        fixed.load_state_dict({"x": 1})
    assert type(advantages.build(f"{path}:Estimator")).__name__ == "Estimator"
    assert float(losses.build(f"{path}:Loss")(torch.ones(2, 3), None, 0)) == 6.0  # type: ignore[arg-type]
    settings = ObjectiveConfig(name="mine", kind=f"{path}:Kind", options={"value": 4}, clip=3)
    assert objectives.build(settings).score([Prompt(0, "a")], ["b"]) == [3.0]


def test_a_subclass_has_a_name_of_its_own() -> None:
    class Again(aggregation.methods()["gapo"]):  # type: ignore[misc]
        pass

    class Named(HostMethod):
        name = "called"

        def solve(self, gram: torch.Tensor, active: object) -> Solution:
            return Solution(gram.diagonal())

    assert (Again.name, Named.name, aggregation.methods()["gapo"].name) == ("Again", "called", "gapo")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("{file}:Fixde", {}, "aggregation.name: file {file} has no 'Fixde' (did you mean 'Fixed'?)"),
        ("{file}:NUMBER", {}, "found {file}:NUMBER, of type int (did you mean"),
        ("{file}:Odd", {}, "found {file}:Odd, a class of another kind"),
        ("{file}:Half", {}, "found {file}:Half, which does not define solve (did you mean"),
        ("{file}:Half", {}, "accepted: a class derived from gapo_mega.aggregation.base.Aggregator"),
        ("{file}:", {}, "found '{file}:', accepted: 'module:Class' or 'path/to/file.py:Class'"),
        ("a b:C", {}, "found 'a b:C', accepted: 'module:Class' or 'path/to/file.py:Class'"),
        ("absent/file.py:C", {}, "file absent/file.py not found"),
        ("no_such_module:C", {}, "found module 'no_such_module', which Python does not find"),
        ("gapo_mega.losses.ppo:Ppo", {}, "found gapo_mega.losses.ppo:Ppo, a class of another kind"),
        ("{file}:Fixed", {"frist": 1}, "options ({file}:Fixed): found 'frist' (did you mean 'first'?)"),
        ("{file}:Needy", {}, "options ({file}:Needy): missing a required argument: 'first'"),
        ("mine", {}, "upgrad, weighted_sum, module:Class, path/to/file.py:Class"),
    ],
)
def test_mistakes_are_one_line(write: Write, name: str, options: dict[str, object], message: str) -> None:
    file = str(write("mine_wrong.py", AGGREGATOR))
    with pytest.raises(ValueError) as caught:
        aggregation.build(name.format(file=file), **options)
    assert message.format(file=file) in str(caught.value)
    assert str(caught.value).startswith("aggregation.") and "\n" not in str(caught.value)


def test_errors_inside_the_file_are_told_with_file_and_line(write: Write) -> None:
    path = write("failing_value.py", "x = 1\nint('x')\n")
    with pytest.raises(ValueError, match=rf"^aggregation\.name: {path}, line 2: invalid literal") as caught:
        aggregation.build(f"{path}:C")
    assert isinstance(caught.value.__cause__, ValueError)
    path = write("failing_import.py", "x = 1\ny = 2\nimport no_such_dependency\n")
    for name in (f"{path}:C", "failing_import:C"):  # its folder is on the path by now
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as missing:
            aggregation.build(name)
        assert (missing.traceback[-1].path, missing.traceback[-1].lineno) == (path, 2)  # counted from 0
    path = write("failing_syntax.py", "x = (\n")
    with pytest.raises(SyntaxError) as broken:
        aggregation.build(f"{path}:C")
    assert (broken.value.filename, broken.value.lineno) == (str(path), 1)


def test_a_file_that_failed_is_read_anew(write: Write) -> None:
    path = write("json.py", "1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_function("x", f"{path}:f")
    path.write_text("def f(): return 'whole'")
    assert load_function("x", f"{path}:f")() == "whole"


def test_the_path_grows_by_the_folder_at_its_end(write: Write) -> None:
    path, before = write("files/mine_last.py", AGGREGATOR), list(sys.path)
    for _ in range(2):
        load_class("x", f"{path}:Fixed", Aggregator)
        assert sys.path == [*before, str(path.parent)]


def test_a_reward_that_is_served_is_looked_for_in_the_same_places(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def f(prompts, responses):\n    return [len(r) for r in responses]\n"
    write("rewards_beside.py", code)
    write("here/rewards_here.py", code)
    path = write("reward.yaml", "{name: mine, function: 'rewards_beside:f'}")
    monkeypatch.chdir(tmp_path / "here")
    for config in (
        objective_config(path, None, None, []),
        objective_config(None, None, "rewards_here.py:f", []),
        objective_config(None, None, "rewards_here:f", []),
    ):
        assert objectives.build(config).score([Prompt(0, "a")], ["four"]) == [4.0]


def test_functions_of_a_file(write: Write) -> None:
    path = write("rewards_mine.py", "def f(prompts, responses, *, k=1):\n    return [k for _ in responses]\n")
    settings = ObjectiveConfig(name="mine", function=f"{path}:f", options={"k": 2})
    assert objectives.build(settings).score([Prompt(0, "a")], ["b"]) == [2.0]
    wrong = ObjectiveConfig(name="mine", function=f"{path}:g")
    with pytest.raises(
        ValueError, match=rf"^objective 'mine': function: file {path} has no 'g' \(did you mean 'f'"
    ):
        objectives.build(wrong)


def test_what_is_a_class() -> None:
    """Python 3.10 says of ``list[int]`` that it is a type, and refuses to compare it with one."""
    assert is_subclass(bool, int) and is_subclass(int, int)
    assert not is_subclass(int, bool)
    assert not any(is_subclass(value, list) for value in (list[int], [1], "list", None, typing.Sequence[int]))
