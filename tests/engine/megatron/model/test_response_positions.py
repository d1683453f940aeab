"""The output layer at response positions gives what it gives everywhere, from fewer rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.model.forward import run_at_responses, run_model
from gapo_mega.engine.megatron.model.logprobs import before_response
from gapo_mega.engine.megatron.model.response_positions import Rectangle, output_only_at
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.types import TokenBatch
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.tiny import tiny_llama

VOCABULARY = 200


def masks() -> dict[str, Tensor]:
    """Of 12 positions, by what is special about them; column 0 is False."""
    position_T = torch.arange(12)
    start_B1, end_B1 = torch.tensor([[3], [1], [5], [8]]), torch.tensor([[9], [4], [12], [10]])
    holes = torch.rand(4, 12, generator=torch.Generator().manual_seed(3)) < 0.4
    holes[:, 0] = False
    unequal = (position_T >= start_B1) & (position_T < end_B1)
    silent = unequal.clone()
    silent[2] = False
    return {
        "unequal": unequal,
        "equal": (position_T >= torch.tensor([[6], [4], [7], [2]]))
        & (position_T < torch.tensor([[11], [9], [12], [7]])),
        "holes": holes,
        "everything": (position_T > 0).expand(4, -1).contiguous(),
        "silent row": silent,
        "nothing": torch.zeros(4, 12, dtype=torch.bool),
        "one row": unequal[:1],
    }


@pytest.mark.parametrize("multiple", [1, 4, 5])
@pytest.mark.parametrize("name", masks())
def test_narrowed_and_picked_are_the_wanted_rows(name: str, multiple: int) -> None:
    """Values and gradients bit by bit: rows are copied, and every wanted one once."""
    mask_BT = masks()[name]
    sequences, width = len(mask_BT), 12 + -12 % multiple
    generator = torch.Generator().manual_seed(1)
    hidden_SBD = torch.randn(width, sequences, 6, generator=generator, dtype=torch.float64).requires_grad_()
    rectangle = Rectangle.around(mask_BT, width, multiple)
    narrowed_RBD = rectangle.narrow(hidden_SBD)
    longest = max(1, int(mask_BT.sum(dim=1).max()))
    rows = min(longest + -longest % multiple, width)
    assert narrowed_RBD.shape == (rows, sequences, 6)
    found_ND = rectangle.pick(narrowed_RBD)
    expected_ND = before_response(hidden_SBD.transpose(0, 1), mask_BT)
    assert torch.equal(found_ND, expected_ND)
    weight_ND = torch.randn(expected_ND.shape, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad((found_ND * weight_ND).sum(), hidden_SBD)
    (expected,) = torch.autograd.grad((expected_ND * weight_ND).sum(), hidden_SBD)
    assert torch.equal(found, expected)


@pytest.fixture(scope="module", params=["untied", "tied"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MegatronEngine]:
    folder = tmp_path_factory.mktemp("narrow")
    tiny_llama(folder / "model", tied=request.param == "tied")
    built = check_engine.build_engine(check_engine.make_config(str(folder / "model"), {}, {}))
    with megatron_device():
        yield built
    worlds.leave()


def gradients(engine: MegatronEngine, logits_NV: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every logit differently."""
    engine.policy.zero_grad()
    generator = torch.Generator().manual_seed(2)
    (logits_NV * torch.randn(logits_NV.shape, generator=generator)).sum().backward()
    return {name: p.main_grad.clone() for name, p in engine.policy.modules[0].named_parameters()}


@pytest.mark.parametrize("name", [name for name in masks() if name != "nothing"])
def test_logits_and_gradients_are_those_of_the_whole_output_layer(engine: MegatronEngine, name: str) -> None:
    mask_BT = masks()[name]
    tokens_BT = torch.randint(0, VOCABULARY, mask_BT.shape, generator=torch.Generator().manual_seed(4))
    model = engine.policy.model
    found_NV = run_at_responses(model, TokenBatch(tokens_BT, mask_BT), 1)
    found = gradients(engine, found_NV)
    expected_NV = before_response(run_model(model, tokens_BT, 1), mask_BT)
    expected = gradients(engine, expected_NV)
    # fp32: a product of other rows beside them may be summed in other blocks.
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-5, atol=1e-5)
    assert set(found) == set(expected)
    for parameter, gradient in expected.items():
        # Some roundings of 6e-8, relative to the gradient's length.
        error = float((found[parameter] - gradient).norm() / gradient.norm())
        assert error <= 5e-7, parameter


def test_the_output_layer_sees_a_rectangle_and_others_the_sequence(engine: MegatronEngine) -> None:
    mask_BT = masks()["unequal"]
    tokens_BT = torch.ones(mask_BT.shape, dtype=torch.int64)
    model = engine.policy.modules[0]
    before: list[tuple[int, ...]] = []
    within: list[tuple[int, ...]] = []
    early = model.output_layer.register_forward_pre_hook(lambda _, args: before.append(args[0].shape))
    with torch.no_grad(), output_only_at(model, Rectangle.around(mask_BT, 12, 1)):
        late = model.output_layer.register_forward_pre_hook(lambda _, args: within.append(args[0].shape))
        output = run_model(model, tokens_BT, 1)
        late.remove()
    assert [tuple(shape) for shape in within] == [(7, 4, 72)]  # the longest response has 7 tokens
    assert [tuple(shape) for shape in before] == [(12, 4, 72)]  # what gradients/output_layer.py listens to
    assert output.shape[:2] == (1, int(mask_BT.sum()))
    early.remove()
    with torch.no_grad():  # no hook is left
        assert run_model(model, tokens_BT, 1).shape[:2] == (4, 12)
