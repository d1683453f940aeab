"""Gradients in float64 in one process: transformers and torch.autograd, the loss written down anew."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega.models import HFDirectory
from gapo_mega.models.registry import shape_of
from gapo_mega.models.shape import ModelShape
from gapo_mega.types import Experience
from tests.helpers.combinations.settings import AXES, OBJECTIVES, PENALTY, TOP_K, adapter_of
from tests.helpers.peft_models import peft_model, random_adapter
from tests.helpers.ranks.check_engine import global_batch
from tests.helpers.sampled import processors, random_kept, sampled_logprobs
from tests.helpers.tiny import tiny_llama, tiny_mixtral

VOCABULARY, LAYERS = 200, 4
_ADAPTER = "adapter_model.safetensors"
# Of the ratio of probabilities: its logarithm is clipped to [-0.69, 0.41], and starts from one of these.
CLIP_EPSILON = 0.5
LOG_RATIOS = (-1.3, -0.15, -0.13, 0.95)

Named = Mapping[str, Tensor]


def write_models(folder: Path) -> None:
    """The models, in fp32 but of numbers that bf16 has: a run in bf16 starts from the same ones."""
    for tied in AXES["tied"]:
        for kind in AXES["model"]:
            directory = directory_of(folder, kind, tied)
            if kind == "experts":
                model = tiny_mixtral(directory, vocab=VOCABULARY, tie_word_embeddings=tied == "true")
            else:
                model = tiny_llama(directory, tied=tied == "true", vocab=VOCABULARY)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.bfloat16())
            model.save_pretrained(directory)
            if kind == "adapters":
                _write_adapter(directory)


def _write_adapter(directory: Path) -> None:
    adapter = random_adapter(directory, Path(adapter_of(str(directory))))
    tensors = {name: value.bfloat16().float() for name, value in load_file(adapter / _ADAPTER).items()}
    save_file(tensors, adapter / _ADAPTER, metadata={"format": "pt"})


def directory_of(folder: Path, kind: str, tied: str) -> Path:
    """One of ``write_models``."""
    return folder / f"{kind}-tied-{tied}"


def shapes_of(folder: Path) -> dict[str, ModelShape]:
    """The shapes of ``write_models`` by kind."""
    return {kind: shape_of(HFDirectory(directory_of(folder, kind, "false")).config) for kind in AXES["model"]}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory, or of an adapter in PEFT's format, in float64."""
    files = [directory / name for name in ("model.safetensors", _ADAPTER) if (directory / name).exists()]
    (file,) = files
    return {name: value.double() for name, value in load_file(file).items()}


@dataclass(frozen=True)
class Gradients:
    """Of every objective's loss, at one point."""

    losses: Tensor  # [M]
    loss_scale: Tensor  # [M]: the mean size of the summands that a loss is the mean of
    margin: float  # how near the logarithm of a ratio comes to where it is clipped
    full: list[dict[str, Tensor]]  # by name, for every objective
    head: list[Tensor]  # of the output layer's weight as output layer only, were it tied or not

    def rows(self, scope: Any, weight: Named | None = None) -> Tensor:
        """The gradients of the parameters in ``scope``, flattened [M, N].

        ``weight``: by name; of every element the factor that it is multiplied by.
        """
        return torch.stack([self._row(k, scope, weight) for k in range(len(self.full))])

    def gram(self, scope: Any, metric: Named | None = None) -> Tensor:
        """Inner products [M, M]; ``metric``: by name, the diagonal D in ``<a, D b>``."""
        return self.rows(scope) @ self.rows(scope, metric).T

    def _row(self, objective: int, scope: Any, weight: Named | None) -> Tensor:
        parts = [
            (grad if weight is None else grad * weight[name]).flatten()
            for name, grad in sorted(self.full[objective].items())
            if in_scope(name, scope)
        ]
        if scope in ("last_layer", "last_block"):
            assert weight is None, "the output layer's use of a tied weight has no second moment"
            parts.append(self.head[objective].flatten())
        return torch.cat(parts)


def in_scope(name: str, scope: Any) -> bool:
    """Whether a parameter counts; the output layer is seen to elsewhere."""
    if scope == "full":
        return True
    named = {"last_layer": [], "last_block": [[LAYERS - 1, LAYERS]]}
    ranges = named[scope] if isinstance(scope, str) else scope
    return any(f".layers.{i}." in name for first, end in ranges for i in range(first, end))


class Reference:
    """One of the models and its batch; gradients at its weights, and at others.

    ``temperature``, ``edited``: of the distribution that the batch was drawn from.
    """

    def __init__(self, directory: Path, temperature: float, edited: bool) -> None:
        # The default for experts has no float64.
        eager: dict[str, Any] = {"experts_implementation": "eager"}
        adapter = Path(adapter_of(str(directory)))
        if adapter.exists():
            self._model = peft_model(directory, adapter).base_model.model
        else:
            self._model = AutoModelForCausalLM.from_pretrained(directory, **eager).double()
        self._trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self.start = tensors_of(adapter if adapter.exists() else directory)
        own = self._by_file([parameter.detach() for parameter in self._trained.values()])
        assert own.keys() == self.start.keys() and all(own[k].equal(v) for k, v in self.start.items())
        whole = global_batch(VOCABULARY)
        self._tokens_BT = whole.tokens_BT
        self._chain = processors(temperature, PENALTY if edited else 1.0)
        self._kept, self._dropped_BTV = None, None
        if edited:
            share = TOP_K / VOCABULARY
            self._kept, self._dropped_BTV = random_kept(
                whole.tokens_BT, whole.response_mask_BT, VOCABULARY, share
            )
        self.batch = self._batch()
        self.first = self.at(self.start)

    def at(self, weights: Named) -> Gradients:
        """Gradients of all objectives with ``weights`` by their Hugging Face names."""
        parameters = list(self._trained.values())
        self._load(weights)
        hidden = self._model.model(input_ids=self._tokens_BT).last_hidden_state
        head = self._model.lm_head.weight
        use = head.detach().clone().requires_grad_()
        losses, scales, margin = self._losses(hidden @ head.t())
        alone, _, _ = self._losses(hidden.detach() @ use.t())
        full = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        head_only = [torch.autograd.grad(loss, use, retain_graph=True)[0] for loss in alone]
        return Gradients(
            torch.stack(losses).detach(),
            torch.stack(scales).detach(),
            margin,
            [self._by_file(grads) for grads in full],
            head_only,
        )

    @torch.no_grad()
    def _load(self, weights: Named) -> None:
        """Take weights by the names that files have."""
        for name, parameter in self._trained.items():
            parts = [[weights[file] for file in files] for files in _files(name, len(parameter))]
            parameter.copy_(torch.stack([torch.cat(part) for part in parts]).view(parameter.shape))

    def _by_file(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Values of all parameters by the names that files have."""
        found = {}
        for name, value in zip(self._trained, values, strict=True):
            groups = _files(name, len(value))
            for files, part in zip(groups, value.unsqueeze(0) if len(groups) == 1 else value, strict=True):
                found |= dict(zip(files, part.chunk(len(files)), strict=True))
        return found

    def _losses(self, logits_BTV: Tensor) -> tuple[list[Tensor], list[Tensor], float]:
        """PPO's clipped losses, the mean size of what they are means of, and the margin."""
        assert self.batch.advantages_MBT is not None
        mask = self.batch.response_mask_BT[:, 1:]
        change = self._logprobs(logits_BTV)[:, 1:] - self.batch.old_logprobs_BT[:, 1:].double()
        ratio = change[mask].exp()
        clipped = ratio.clamp(1 - CLIP_EPSILON, 1 + CLIP_EPSILON)
        terms = [
            torch.min(ratio * a, clipped * a)
            for a in (advantages_BT[:, 1:][mask] for advantages_BT in self.batch.advantages_MBT.double())
        ]
        edges = torch.tensor([1 - CLIP_EPSILON, 1 + CLIP_EPSILON], dtype=torch.float64).log()
        margin = float((change[mask].detach()[:, None] - edges).abs().min())
        return [-term.mean() for term in terms], [term.abs().mean() for term in terms], margin

    def _logprobs(self, logits_BTV: Tensor) -> Tensor:
        """Log-probability of every token given those before it [B, T]; 0 for the first."""
        return sampled_logprobs(logits_BTV, self._tokens_BT, self._chain, self._dropped_BTV)

    @torch.no_grad()
    def _batch(self) -> Experience:
        """Two objectives; old log-probabilities beside this model's own by a little or by far.

        Some ratios are clipped and some are not; neither a step nor bf16 moves one over the edge: a token
        more or less in the gradient would be as much as a tenth of it.
        """
        whole = global_batch(VOCABULARY)
        own_BT = self._logprobs(self._model(self._tokens_BT).logits).float()
        generator = torch.Generator().manual_seed(7)
        choice_BT = torch.randint(len(LOG_RATIOS), own_BT.shape, generator=generator)
        noise_BT = -torch.tensor(LOG_RATIOS)[choice_BT]
        assert whole.advantages_MBT is not None
        return dataclasses.replace(
            whole,
            kept=self._kept,
            old_logprobs_BT=(own_BT + noise_BT) * whole.response_mask_BT,
            scores_MB=whole.scores_MB[:OBJECTIVES],
            token_rewards_MBT=whole.token_rewards_MBT[:OBJECTIVES],
            advantages_MBT=whole.advantages_MBT[:OBJECTIVES],
        )


def _files(name: str, count: int) -> list[list[str]]:
    """A parameter's tensors in files: each of ``count`` experts of Mixtral has its own.

    Of a model with adapters these alone, as PEFT names them.
    """
    if name.endswith(".default.weight"):
        return [[f"base_model.model.{name.replace('.default', '')}"]]
    layer, _, kind = name.partition("mlp.experts.")
    if not kind:
        return [[name.replace("mlp.gate.", "block_sparse_moe.gate.")]]
    parts = {"gate_up_proj": ["w1", "w3"], "down_proj": ["w2"]}[kind]
    return [[f"{layer}block_sparse_moe.experts.{i}.{part}.weight" for part in parts] for i in range(count)]


@functools.cache
def reference_of(folder: Path, kind: str, tied: str, temperature: str, sampling: str) -> Reference:
    """The reference of one of ``write_models``' models and a way of sampling, one for the process."""
    return Reference(directory_of(folder, kind, tied), float(temperature), sampling == "edited")
