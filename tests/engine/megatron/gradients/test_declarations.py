"""Every declared strategy is implemented, with the rows that it declares; and one more from two new files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

import gapo_mega.engine.megatron.gradients as package
from gapo_mega import aggregation
from gapo_mega.config import GradientConfig, ParallelConfig, strategies
from gapo_mega.config.strategies import RankSizes
from gapo_mega.config.strategies.kept_rows import KeptRows
from gapo_mega.engine.megatron.gradients.strategies import implementation_of
from gapo_mega.engine.megatron.gradients.update import GradientStrategy
from gapo_mega.measuring.step import contenders
from gapo_mega.models import HFDirectory
from gapo_mega.models.registry import shape_of
from gapo_mega.planning.memory import rank_sizes
from gapo_mega.registry import implementations
from tests.helpers.plugin_files import file_in
from tests.helpers.policy_gradients import SGD, WHOLE, engine_of
from tests.helpers.ranks import check_engine
from tests.helpers.sum_only import DECLARATION, IMPLEMENTATION

ADAM = {"name": "adam", "distributed": False}


def test_each_declaration_has_one_implementation() -> None:
    found = [kind.declaration for kind in implementations(package, GradientStrategy)]
    assert sorted(kind.name for kind in found) == ["kept_rows", "no_rows", "one_pass", "scoped_rows"]
    for declared in strategies.declarations():
        assert implementation_of(declared).declaration is declared


def test_a_declaration_without_an_implementation_is_named() -> None:
    class Nobody(KeptRows):
        name: ClassVar[str] = "nobody"

    with pytest.raises(RuntimeError, match="strategy nobody: implemented by none; exactly one class should"):
        implementation_of(Nobody)


@pytest.mark.parametrize(
    "gradients",
    [
        *(pytest.param(dict(variant.gradients), id=variant.name) for variant in strategies.variants()),
        pytest.param({"actual_change": True}, id="actual change"),
        pytest.param({"scope": [[0, 1], [2, 3]]}, id="layers"),
    ],
)
def test_rows_are_as_declared(model: Path, gradients: dict[str, Any]) -> None:
    """To the byte, from the model's shape and the elements in Megatron's buffer."""
    shape = shape_of(HFDirectory(model).config)
    declared = strategies.chosen(GradientConfig.model_validate(gradients))
    with engine_of(model, gradients, WHOLE, ADAM) as engine:
        (buffer,) = engine.policy.model.buffers
        sizes = rank_sizes(
            ParallelConfig(), shape, buffer.grad_data.numel(), buffer.grad_data.numel(), stage=0
        )
        assert engine.gradients.row_bytes == declared.row_bytes(check_engine.OBJECTIVES, sizes)


def test_other_rows_than_declared_stop_the_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_more(self: KeptRows, objectives: int, sizes: RankSizes) -> int:
        return objectives * sizes.shard * 4

    monkeypatch.setattr(KeptRows, "row_bytes", one_more)
    with (
        pytest.raises(AssertionError, match=r"kept_rows declares \d+ bytes of rows and has \d+"),
        engine_of(model, {"forward": "separate"}, WHOLE, SGD),
    ):
        pass


def test_a_new_strategy_is_two_files(model: Path, tmp_path: Path) -> None:
    """Declared and implemented, it trains, and the step benchmark has it among its contenders."""
    with (
        file_in(strategies, "sum_only", DECLARATION, tmp_path),
        file_in(package, "sum_only", IMPLEMENTATION, tmp_path),
    ):
        with engine_of(model, {"store": "sum_only"}, WHOLE, SGD) as engine:
            batch = check_engine.local_part(check_engine.global_batch(200), engine)
            report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo", p=1))
            assert type(engine.gradients).__name__ == "SumOnly" and engine.gradients.row_bytes == 3 * 8 * 4
        assert report.weights.tolist() == [1.0, 1.0, 1.0] and not report.skipped
        shape = shape_of(HFDirectory(model).config)
        names = [c.name for c in contenders(check_engine.make_config(str(model), {}, SGD), shape, 1, [2])]
        assert "sum only" in names
