"""Every declared gradient strategy: chosen, refused, counted; and one more from a file of its own."""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gapo_mega.config import Config, GradientConfig, strategies
from gapo_mega.config.loading import load
from gapo_mega.config.strategies import PassCount, RankSizes, chosen
from gapo_mega.config.strategies.scoped import layers_in
from gapo_mega.models import ModelShape
from gapo_mega.planning.memory import predict
from gapo_mega.planning.strategy import forward_kind
from tests.helpers.plugin_files import file_in
from tests.helpers.resolved import check, resolved_run
from tests.helpers.sum_only import DECLARATION

SCOPES = ("full", "last_layer", "last_block", [[0, 1]], [[0, 1], [2, 4]])
OBJECTIVES = (1, 2, 4)
# A rank of the second of two stages; ranges below are of its layers 2 and 3, but for [[0, 1]].
SIZES = RankSizes(shard=1000, whole=2000, layer=100, layers=range(2, 4), num_layers=4, output_layer=50)
SHAPE = ModelShape("llama", 4, 8, 16, 2, 2, 4, 64, False, 1e4, 1e-5, False, 320)

BF16 = (
    "gradients.store_dtype: found bf16, accepted: fp32 (bf16 is for the rows of store shards with scope full)"
)
CHANGE = (
    "gradients.actual_change: found true, accepted: false (it needs every gradient: store shards with scope "
    "full)"
)


def sections() -> list[dict[str, Any]]:
    """The product of the options that strategies differ by; valid or not."""
    options: dict[str, tuple[Any, ...]] = {
        "store": ("shards", "single"),
        "store_dtype": ("fp32", "bf16"),
        "forward": ("auto", "one_pass", "shared", "separate"),
        "scope": SCOPES,
        "metric": ("euclidean", "adam"),
        "actual_change": (None, True, False),
    }
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def expected_refusal(section: dict[str, Any]) -> str | None:
    """The message for a section, the first of several."""
    store, scope = section["store"], section["scope"]
    if store == "single" and scope != "full":
        return (
            f"gradients.scope: found {scope} with store single, accepted: full (single measures sums of "
            "whole gradients)"
        )
    whole = store == "shards" and scope == "full"
    one_pass = section["forward"] == "one_pass"
    if one_pass and not whole:
        return (
            f"gradients.forward: found one_pass with store {store} and scope {scope}, accepted: auto, "
            "shared, separate (one_pass is for whole gradients: store shards with scope full)"
        )
    if section["store_dtype"] == "bf16" and one_pass:
        return (
            "gradients.store_dtype: found bf16 with forward one_pass, accepted: fp32 (the sum over "
            "microbatches would be rounded every time)"
        )
    if section["store_dtype"] == "bf16" and not whole:
        return BF16
    if section["metric"] == "adam" and scope in ("last_layer", "last_block"):
        return (
            f"gradients.metric: found adam with scope {scope}, accepted: euclidean (the output layer's "
            "gradient alone has no second moment: a tied one shares the embedding's)"
        )
    return CHANGE if section["actual_change"] and not whole else None


def test_the_folder_is_what_it_was() -> None:
    """Every other test here is about these; a new file comes with its own tests."""
    assert [kind.name for kind in strategies.declarations()] == [
        "kept_rows",
        "no_rows",
        "one_pass",
        "scoped_rows",
    ]
    assert strategies.stores() == ["shards", "single"]


def test_exactly_one_strategy_is_chosen_and_it_refuses_what_it_says() -> None:
    names = set()
    for section in sections():
        try:
            found = GradientConfig.model_validate(section)
            message = None
        except ValidationError as error:
            (detail,) = error.errors()
            message = detail["msg"].removeprefix("Value error, ")
        assert message == expected_refusal(section), section
        if message is None:
            kinds = [kind for kind in strategies.declarations() if kind.chosen_by(found)]
            single, full = section["store"] == "single", section["scope"] == "full"
            rows = "one_pass" if section["forward"] == "one_pass" else "kept_rows"
            expected = "no_rows" if single else rows if full else "scoped_rows"
            assert [kind.name for kind in kinds] == [expected] == [chosen(found).name]
            names.add(expected)
    assert names == {kind.name for kind in strategies.declarations()}


def test_every_strategy_has_a_variant_and_variants_choose_it() -> None:
    variants = [variant.name for variant in strategies.variants()]
    assert len(set(variants)) == len(variants)
    for kind in strategies.declarations():
        assert kind.variants
        for variant in kind.variants:
            section = GradientConfig.model_validate(dict(variant.gradients))
            assert type(chosen(section)) is kind
    against_peers = [variant.name for variant in strategies.variants() if variant.against_peers]
    assert against_peers == ["separate", "shared", "single", "one_pass", "last_layer"]


@pytest.mark.parametrize(
    ("gradients", "separate", "shared"),
    [
        ({}, [(1, 1), (2, 2), (4, 4)], [(1, 1), (1, 2), (1, 4)]),
        ({"forward": "one_pass"}, [(1, 1), (1, 1), (1, 1)], [(1, 1), (1, 1), (1, 1)]),
        ({"store": "single"}, [(1, 1), (4, 4), (11, 11)], [(1, 1), (1, 4), (1, 11)]),
        ({"scope": "last_layer"}, [(2, 1), (2, 1), (2, 1)], [(1, 1), (1, 1), (1, 1)]),
        ({"scope": "last_block"}, [(3, 1), (4, 1), (6, 1)], [(1, 1), (1, 1), (1, 1)]),
        ({"scope": [[0, 1]]}, [(2, 1), (3, 1), (5, 1)], [(1, 1), (1, 1), (1, 1)]),
    ],
)
def test_passes(
    gradients: dict[str, Any], separate: list[tuple[int, int]], shared: list[tuple[int, int]]
) -> None:
    strategy = chosen(GradientConfig.model_validate(gradients))
    assert [strategy.passes(m, shared=False) for m in OBJECTIVES] == [PassCount(*p) for p in separate]
    assert [strategy.passes(m, shared=True) for m in OBJECTIVES] == [PassCount(*p) for p in shared]


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ({}, [0, 4000, 12000]),
        ({"store_dtype": "bf16"}, [0, 2000, 6000]),
        ({"actual_change": True}, [4000, 8000, 16000]),
        ({"forward": "one_pass"}, [0, 8000, 24000]),
        ({"forward": "one_pass", "actual_change": True}, [4000, 12000, 28000]),
        ({"store_dtype": "bf16", "metric": "adam"}, [4000, 6000, 10000]),
        ({"metric": "adam", "actual_change": False}, [0, 4000, 12000]),
        ({"store": "single"}, [0, 0, 0]),
        ({"store": "single", "metric": "adam"}, [0, 0, 0]),
        ({"scope": "last_layer"}, [200, 400, 800]),
        ({"scope": "last_block"}, [200, 800, 2000]),
        ({"scope": [[1, 4]]}, [0, 800, 2400]),
        ({"scope": [[0, 1], [3, 4]]}, [0, 400, 1200]),
        ({"scope": [[0, 1]]}, [0, 0, 0]),
    ],
)
def test_bytes_of_rows(gradients: dict[str, Any], expected: list[int]) -> None:
    strategy = chosen(GradientConfig.model_validate(gradients))
    assert [strategy.row_bytes(m, SIZES) for m in OBJECTIVES] == expected


def test_rows_of_a_scope_are_at_most_a_shard_and_the_output_layer_is_on_one_stage() -> None:
    small = replace(SIZES, shard=150)
    strategy = chosen(GradientConfig(scope=[[2, 4]]))
    assert [strategy.row_bytes(m, small) for m in OBJECTIVES] == [0, 600, 1800]
    first = replace(SIZES, layers=range(2), output_layer=0)
    assert [chosen(GradientConfig(scope="last_block")).row_bytes(m, first) for m in OBJECTIVES] == [0, 0, 0]


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ({}, [False, True, True]),
        ({"store": "single"}, [False, True, True]),
        ({"scope": "last_layer"}, [False, False, False]),
        ({"scope": "last_block"}, [True, True, True]),
        ({"scope": [[0, 1]]}, [True, True, True]),
    ],
)
def test_whether_a_graph_serves_several_backwards(gradients: dict[str, Any], expected: list[bool]) -> None:
    strategy = chosen(GradientConfig.model_validate(gradients))
    assert [strategy.reuses_graph(m) for m in OBJECTIVES] == expected


@pytest.mark.parametrize(
    ("gradients", "one", "several", "recomputed"),
    [
        ({}, None, None, None),
        (
            {"store_dtype": "bf16"},
            None,
            "3 microbatches and store_dtype bf16 (the sum over microbatches would be rounded every time)",
            None,
        ),
        ({"store": "single"}, None, "3 microbatches and store single", None),
        ({"scope": "last_layer"}, None, "3 microbatches and scope last_layer", None),
        (
            {"scope": [[0, 1]]},
            None,
            "3 microbatches and scope [[0, 1]]",
            "model.recompute full (recomputed layers have no partial backward)",
        ),
    ],
)
def test_what_cannot_share_a_forward(
    gradients: dict[str, Any], one: str | None, several: str | None, recomputed: str | None
) -> None:
    strategy = chosen(GradientConfig.model_validate(gradients))
    assert strategy.refusal_of_shared(1, "none") == one
    assert strategy.refusal_of_shared(3, "none") == several
    assert strategy.refusal_of_shared(1, "full") == recomputed


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ({}, True),
        ({"metric": "adam", "actual_change": True}, True),
        ({"store_dtype": "bf16"}, False),
        ({"store": "single"}, False),
        ({"scope": "last_layer"}, False),
        ({"scope": [[0, 1]]}, False),
    ],
)
def test_what_one_pass_can_measure(gradients: dict[str, Any], expected: bool) -> None:
    """`auto` and the refusals agree."""
    assert chosen(GradientConfig.model_validate(gradients)).has_one_pass_form == expected
    asked = {**gradients, "forward": "one_pass"}
    if expected:
        assert chosen(GradientConfig.model_validate(asked)).name == "one_pass"
    else:
        with pytest.raises(ValidationError, match=r"gradients\.\w+: found .*one_pass.*, accepted: "):
            GradientConfig.model_validate(asked)


def test_layers_in_a_scope() -> None:
    assert layers_in("last_layer", 6) == []
    assert layers_in("last_block", 6) == [[5, 6]]
    assert layers_in([[0, 2], [3, 4]], 6) == [[0, 2], [3, 4]]


def raw() -> dict[str, Any]:
    return {
        "output_dir": "o",
        "model": {"path": "m"},
        "data": {"source": "s"},
        "objectives": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw()))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gradients.store=rows", "gradients.store: found 'rows', accepted: 'shards' or 'single'"),
        ("gradients.store=3", "gradients.store: found 3, accepted: 'shards' or 'single'"),
        ("gradients={store: single, store_dtype: bf16}", BF16),
        ("gradients={scope: last_layer, actual_change: true}", CHANGE),
        (
            "gradients.scope=[[2, 1]]",
            "gradients.scope: found [[2, 1]], accepted: pairs [first, end] in ascending order, each with "
            "0 <= first < end",
        ),
    ],
)
def test_refused_when_the_file_is_read(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(file, [override])
    assert str(caught.value) == f"{message} (from override {override!r})"


def test_overlapping_strategies_are_named(tmp_path: Path) -> None:
    greedy = DECLARATION.replace('store: ClassVar[str] = "sum_only"', 'store: ClassVar[str] = "single"')
    with (
        file_in(strategies, "sum_only", greedy, tmp_path),
        pytest.raises(RuntimeError, match=r"no_rows, sum_only; exactly one strategy should be"),
    ):
        GradientConfig(store="single")


def test_a_new_strategy_is_one_file_for_configuration_plan_and_benchmarks(tmp_path: Path, file: Path) -> None:
    """What the engine needs of it: tests/engine/megatron/gradients/test_declarations.py."""
    scripts = str(Path(__file__).resolve().parents[3] / "benchmarks")
    with file_in(strategies, "sum_only", DECLARATION, tmp_path):
        config = load(file, ["gradients.store=sum_only"])
        assert chosen(config.gradients).name == "sum_only"
        with pytest.raises(ValueError, match=r"accepted: 'shards', 'single' or 'sum_only' \(from override"):
            load(file, ["gradients.store=two_passes"])
        with pytest.raises(ValueError, match=r"^gradients\.store_dtype: found bf16, .*\(from override"):
            load(file, ["gradients={store: sum_only, store_dtype: bf16}"])
        check(config, SHAPE, 1)
        with pytest.raises(ValueError, match="sum_only with 41 layers, accepted: up to 40"):
            check(config, replace(SHAPE, num_layers=41), 1)
        shared = Config.model_validate({**raw(), "gradients": {"store": "sum_only", "forward": "shared"}})
        with pytest.raises(ValueError, match="found shared with store sum_only, accepted: auto"):
            check(shared, SHAPE, 1)
        assert forward_kind(config, 1) == "separate"
        assert resolved_run(config, shape=SHAPE).passes == PassCount(2, 2)
        assert predict(resolved_run(config, shape=SHAPE)).stages[0].objective_rows == 8 * 3 * 4
        assert strategies.variants()[-1].name == "sum only"
        sys.path.insert(0, scripts)
        try:
            known = importlib.import_module("peer_entries").known_strategies()
        finally:
            sys.path.remove(scripts)
        assert known["sum only"] == {"store": "sum_only", "forward": "separate"}
    with pytest.raises(ValueError, match="'shards' or 'single'"):
        load(file, ["gradients.store=sum_only"])


@pytest.mark.parametrize("section", [{"store": "single"}, {"scope": "last_layer"}, {"scope": [[0, 1]]}])
def test_means_of_gradients_need_whole_gradients(section: dict[str, Any]) -> None:
    store, scope = section.get("store", "shards"), section.get("scope", "full")
    expected = (
        f"aggregation.average: found 0.9 with gradients.store {store} and gradients.scope {scope}, accepted: "
        "0 (running means are of whole gradients: gradients.store shards with scope full)"
    )
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({**raw(), "aggregation": {"average": 0.9}, "gradients": section})
    assert expected in str(caught.value)
    Config.model_validate({**raw(), "aggregation": {"average": 0.0}, "gradients": section})


@pytest.mark.parametrize(
    "section", [{}, {"forward": "one_pass"}, {"metric": "adam"}, {"store_dtype": "bf16"}]
)
def test_means_of_gradients_go_with_every_form_of_whole_gradients(section: dict[str, Any]) -> None:
    Config.model_validate({**raw(), "aggregation": {"average": 0.9}, "gradients": section})
