"""Executes every example of docs/extending.md as what it claims to be: one new file, in a folder or alone."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import SeedOssConfig, SeedOssForCausalLM

from gapo_mega import advantages, aggregation, losses, objectives, ops, scalarization
from gapo_mega.config import AggregationConfig, LossConfig, ObjectiveConfig
from gapo_mega.config.loading import load
from gapo_mega.models.registry import family_of, shape_of
from gapo_mega.types import Experience, Prompt

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    code.splitlines()[0].removeprefix("# "): code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S)
}
SETTINGS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]

AddFile = Callable[[ModuleType, str], None]


@pytest.fixture
def add_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddFile]:
    """Puts an example into its package's folder, for the length of a test."""
    before = set(sys.modules)

    def add(package: ModuleType, name: str) -> None:
        folder = tmp_path / package.__name__
        folder.mkdir(exist_ok=True)
        path = f"{package.__name__.replace('.', '/')}/{name}.py"
        (folder / f"{name}.py").write_text(EXAMPLES[path])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        importlib.invalidate_caches()

    yield add
    for name in set(sys.modules) - before:
        if name.startswith("gapo_mega.") and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def experience() -> Experience:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, 2:5] = True
    return Experience(
        tokens_BT=torch.zeros(4, 6, dtype=torch.int64),
        response_mask_BT=mask,
        group_B=torch.arange(4),
        old_logprobs_BT=torch.zeros(4, 6),
        ref_logprobs_BT=torch.zeros(4, 6),
        scores_MB=torch.zeros(2, 4),
        token_rewards_MBT=torch.randn(2, 4, 6, generator=generator) * mask,
    )


def test_the_page_has_an_example_of_every_kind() -> None:
    folders = {path.rpartition("/")[0] for path in EXAMPLES}
    kinds = ("aggregation", "objectives", "advantages", "losses", "scalarization", "models/families")
    assert folders == {"", *(f"gapo_mega/{kind}" for kind in kinds)}


def test_aggregator(add_file: AddFile) -> None:
    add_file(aggregation, "equal_power")
    settings = AggregationConfig.model_validate(SETTINGS[1]["aggregation"])
    gram = torch.diag(torch.tensor([4.0, 16.0], dtype=torch.float64))
    plain = aggregation.build("equal_power", power=0.5)(gram)
    # One power each in float64.
    assert plain.tolist() == pytest.approx([2**-0.5, 0.5], rel=1e-14)
    scaled = aggregation.build(settings.name, **settings.options)(gram)
    assert float(scaled @ gram.diagonal().sqrt()) == pytest.approx(3.0, rel=1e-14)
    with pytest.raises(ValueError, match=r"power: found 'x'"):
        aggregation.build("equal_power", power="x")
    with pytest.raises(ValueError, match=r"found 'equal_powers' \(did you mean 'equal_power'\?\)"):
        aggregation.build("equal_powers")


def test_python_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(EXAMPLES["my_rewards.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ObjectiveConfig.model_validate(SETTINGS[2]["objectives"][0])
    scores = objectives.build(settings).score([Prompt(0, "a"), Prompt(1, "b")], ["x" * 25, "x" * 5000])
    sys.modules.pop("my_rewards")
    assert scores == [-0.5, -10.0]


def test_objective_kind(add_file: AddFile) -> None:
    add_file(objectives, "words")
    polite = ObjectiveConfig(name="polite", kind="words", options={"words": ["please", "thanks"]})
    assert objectives.build(polite).score([Prompt(0, ""), Prompt(1, "")], ["Thanks a lot now", ""]) == [
        0.25,
        0.0,
    ]
    with pytest.raises(ValueError, match=r"objective 'polite': words: found None"):
        objectives.build(ObjectiveConfig(name="polite", kind="words"))


def test_aggregator_with_memory(add_file: AddFile) -> None:
    add_file(aggregation, "running_norm")
    method = aggregation.build("running_norm", decay=0.75)
    first = ops.solve(torch.diag(torch.tensor([4.0, 16.0], dtype=torch.float64)), method)
    assert first.weights.tolist() == [0.5, 0.25]
    gram = torch.diag(torch.tensor([24.0, 0.0], dtype=torch.float64))
    assert method(gram).tolist() == pytest.approx([24**-0.5, 0.0], rel=1e-14)  # nothing was committed yet
    method.commit(first)
    resumed = aggregation.build("running_norm", decay=0.75)
    resumed.load_state_dict(method.state_dict())
    for one in (method, resumed):
        # 0.75 * 4 + 0.25 * 24 = 9; the other one has no gradient.
        assert one(gram).tolist() == pytest.approx([1 / 3, 0.0], rel=1e-14)
    with pytest.raises(ValueError, match=r"aggregation running_norm: found state \['of_another'\]"):
        method.load_state_dict({"of_another": 1})
    with pytest.raises(ValueError, match="decay: found 1"):
        aggregation.build("running_norm", decay=1)


def test_advantage_estimator(add_file: AddFile) -> None:
    add_file(advantages, "batch_mean")
    estimator = advantages.build("batch_mean")
    found = estimator(experience()).advantages_MBT
    assert not estimator.needs_values
    assert found is not None
    total = experience().token_rewards_MBT.sum(dim=2)
    # float32 sums of a few terms of size 1.
    torch.testing.assert_close(found[:, :, 3], total - total.mean(dim=1, keepdim=True), rtol=0, atol=1e-6)
    assert not bool(found[:, :, 5].any())


def test_loss(add_file: AddFile) -> None:
    add_file(losses, "reinforce")
    settings = LossConfig.model_validate(SETTINGS[3]["loss"])
    loss = losses.build(settings.name, **settings.options)
    batch = experience()
    advantages_MBT = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    batch = Experience(**{**vars(batch), "advantages_MBT": advantages_MBT})
    logprobs = torch.full((4, 6), -1.0).masked_fill(~batch.response_mask_BT, math.inf)
    logprobs[1, 3] = -11.0  # below the floor
    (gradient,) = torch.autograd.grad(loss(logprobs.requires_grad_(), batch, 1), logprobs)
    inside = batch.response_mask_BT & (logprobs >= -10)
    assert torch.equal(gradient[inside], -advantages_MBT[1][inside])
    assert not bool(gradient[~inside].any())
    with pytest.raises(ValueError, match=r"floor: found 1, accepted: a number < 0"):
        losses.build("reinforce", floor=1)


def test_scalarizer(add_file: AddFile) -> None:
    add_file(scalarization, "worst")
    scores_MB = torch.tensor([[0.0, 1.0], [3.0, 1.0]])
    found_B = scalarization.build("worst", epsilon=0)(scores_MB, torch.zeros(2), torch.ones(2))
    assert found_B.tolist() == pytest.approx([-(0.5**0.5), -(0.5**0.5)], rel=1e-14)


def test_the_same_files_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, path = set(sys.modules), list(sys.path)
    for name, code in EXAMPLES.items():
        (tmp_path / Path(name).name).write_text(code)
    config_file = tmp_path / "run.yaml"
    rest = {"output_dir": "o", "model": {"path": "m"}, "data": {"source": "s"}}
    config_file.write_text(yaml.safe_dump({**rest, **SETTINGS[0]}))
    monkeypatch.chdir("/")
    config = load(config_file)
    try:
        gram = torch.diag(torch.tensor([4.0, 16.0], dtype=torch.float64))
        weights = aggregation.build(config.aggregation.name, **config.aggregation.options)(gram)
        assert weights.tolist() == pytest.approx([2**-0.5, 0.5], rel=1e-14)  # one power each in float64
        assert advantages.build(config.advantages.name)(experience()).advantages_MBT is not None
        assert losses.build(config.loss.name).name == "reinforce"
        polite, brevity = (objectives.build(objective) for objective in config.objectives)
        assert polite.score([Prompt(0, "")], ["please do"]) == [0.5]
        assert brevity.score([Prompt(0, "")], ["x" * 25]) == [-0.25]
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
                del sys.modules[name]


def test_model_family(add_file: AddFile) -> None:
    """Hugging Face -> Megatron -> Hugging Face over two tensor-parallel ranks gives every bit back."""
    config = SeedOssConfig(
        vocab_size=30, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="model_type 'seed_oss'"):
        family_of(config)  # no family of its own yet, or this would test that one
    add_file(importlib.import_module("gapo_mega.models.families"), "seed_oss")
    torch.manual_seed(0)
    weights = SeedOssForCausalLM(config).state_dict()
    for name, weight in weights.items():
        if name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(weight)
    family = family_of(config)
    assert config.attention_bias and shape_of(config).qkv_bias  # a field that other families refuse
    weight_map = family.weight_map(shape_of(config), tensor=2)
    assert weight_map.hf_names() == set(weights)
    back: dict[str, torch.Tensor] = {}
    for name in weight_map.names():
        parts = [weight_map.to_megatron(name, weights.__getitem__, rank) for rank in (0, 1)]
        back |= weight_map.to_hf(name, parts)
    assert set(back) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name
