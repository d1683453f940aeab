"""The contenders over transformers: torch.autograd by hand, and TorchJD."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from kernel_accuracy import reference_gram
from peer_contender import Seconds, gapo, synchronize
from peer_entries import Entry, in_scope, scope_key
from peer_inputs import BETAS, EPS, LEARNING_RATE, load_model, loss, response_logprobs
from torch import Tensor, nn

from gapo_mega.types import Experience


class HfContender(ABC):
    """A Hugging Face model with AdamW; subclasses fill ``.grad``."""

    def __init__(self, source: str, batch: Experience, objectives: int, attention: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(source, attention)
        nn.Module.to(self.model, device)  # in place; transformers' own method is typed for other uses
        self.named = dict(self.model.named_parameters())
        self.parameters = list(self.named.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0
        )
        self.batch = batch
        self.objectives = objectives
        self.tokens = int(batch.response_mask_BT.sum())

    @abstractmethod
    def fill_gradients(self) -> None:
        """Forward, backward, weights, and their sum in ``.grad``."""

    @abstractmethod
    def jacobians(self) -> list[Tensor] | None:
        """The Jacobian of every parameter, flat [m, n]; None where the method does not form them."""

    def gram(self) -> Tensor | None:
        """The Gram matrix [m, m] by the method's own arithmetic; None where it does not show one."""
        return None

    def losses(self) -> Tensor:
        """Token means [m], with a graph; one forward pass."""
        logprobs_BT = self.logprobs()
        return torch.stack([loss(logprobs_BT, self.batch, i) for i in range(self.objectives)]) / self.tokens

    def logprobs(self) -> Tensor:
        """[B, T], with a graph."""
        return response_logprobs(self.model, self.batch.tokens_BT, self.batch.response_mask_BT)

    def step(self) -> Seconds:
        synchronize()
        start = time.perf_counter()
        self.fill_gradients()
        synchronize()
        filled = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        end = time.perf_counter()
        return end - start, end - filled

    def look(self, scopes: list[Any]) -> dict[str, Any]:
        """Also gives the warnings of one step, which say where a peer is slow."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gram = self.gram()
            jacobians = self.jacobians()
        found: dict[str, Any] = {"gram": None if gram is None else gram.double().tolist()}
        if jacobians is not None:
            found["exact"] = {scope_key(scope): self._exact(jacobians, scope).tolist() for scope in scopes}
        found["warnings"] = sorted({str(warning.message).splitlines()[0] for warning in caught})
        return found

    def _exact(self, jacobians: list[Tensor], scope: Any) -> Tensor:
        layers = self.model.config.num_hidden_layers
        total = torch.zeros(self.objectives, self.objectives, dtype=torch.float64)
        for name, jacobian in zip(self.named, jacobians, strict=True):
            if in_scope(name, scope, layers):
                total += reference_gram(list(jacobian))
        return total


class Single(HfContender):
    """One objective: backward, AdamW."""

    def fill_gradients(self) -> None:
        self.losses()[0].backward()  # type: ignore[no-untyped-call]

    def jacobians(self) -> list[Tensor]:
        self.fill_gradients()
        found = []
        for parameter in self.parameters:
            assert parameter.grad is not None
            found.append(parameter.grad.reshape(1, -1))
        return found


class ByHand(HfContender):
    """``torch.autograd.grad`` per objective through one graph, ``J @ J.T``, GAPO's weights, ``w @ J``."""

    def __init__(self, *arguments: Any, in_place: bool = False) -> None:
        """``in_place``: rows are written into the Jacobian, not stacked to a copy."""
        super().__init__(*arguments)
        self.in_place = in_place
        self.aggregator = gapo()
        self.sizes = [parameter.numel() for parameter in self.parameters]

    def _gradient(self, value: Tensor, keep_graph: bool) -> list[Tensor]:
        grads = torch.autograd.grad(value, self.parameters, retain_graph=keep_graph)
        return [grad.reshape(-1) for grad in grads]

    def jacobian(self) -> Tensor:
        """[m, N]."""
        losses = self.losses().unbind()
        written = torch.empty(
            self.objectives if self.in_place else 0, sum(self.sizes), device=losses[0].device
        )
        rows = []
        for i, value in enumerate(losses):
            keep = i < self.objectives - 1
            if self.in_place:
                torch.cat(self._gradient(value, keep), out=written[i])
            else:
                rows.append(torch.cat(self._gradient(value, keep)))
        return written if self.in_place else torch.stack(rows)

    def fill_gradients(self) -> None:
        jacobian = self.jacobian()
        weights = self.aggregator(self._gram_of(jacobian)).to(jacobian)
        combined = weights @ jacobian
        for parameter, piece in zip(self.parameters, torch.split(combined, self.sizes), strict=True):
            parameter.grad = piece.view_as(parameter)

    def jacobians(self) -> list[Tensor]:
        return list(torch.split(self.jacobian(), self.sizes, dim=1))

    def gram(self) -> Tensor:
        return self._gram_of(self.jacobian())

    @staticmethod
    def _gram_of(jacobian: Tensor) -> Tensor:
        gram = (jacobian @ jacobian.T).double().cpu()
        return (gram + gram.T) / 2  # a product in fp32 need not be symmetric to the last bit


class Autojac(HfContender):
    """TorchJD: Jacobians in ``.jac``, then their aggregation into ``.grad``."""

    def __init__(self, *arguments: Any, aggregator: str, frugal: bool = False) -> None:
        """``frugal``: one row at a time (no vmap), and no Jacobian of all parameters in one piece."""
        super().__init__(*arguments)
        from torchjd import aggregation as theirs
        from torchjd import autojac

        self.autojac = autojac
        self.aggregator = {"UPGrad": theirs.UPGrad, "MGDA": theirs.MGDA, "Mean": theirs.Mean}[aggregator]()
        self.chunk = 1 if frugal else None
        self.options: dict[str, Any] = {"optimize_gramian_computation": True} if frugal else {}

    def _backward(self) -> None:
        self.autojac.backward(self.losses(), inputs=self.parameters, parallel_chunk_size=self.chunk)

    def fill_gradients(self) -> None:
        self._backward()
        self.autojac.jac_to_grad(self.parameters, self.aggregator, **self.options)

    def jacobians(self) -> list[Tensor]:
        self._backward()
        found = []
        parameters: list[Any] = list(self.parameters)  # TorchJD gives them the attribute
        for parameter in parameters:
            jacobian: Tensor = parameter.jac
            found.append(jacobian.reshape(self.objectives, -1))
            del parameter.jac
        return found


class Autogram(HfContender):
    """TorchJD: the Gram matrix without the Jacobian, UPGrad's weights, then a weighted backward."""

    def __init__(self, *arguments: Any, by_sequence: bool) -> None:
        """``by_sequence``: one output per objective and sequence, which its batched mode is made for."""
        super().__init__(*arguments)
        from torchjd.aggregation import UPGradWeighting
        from torchjd.autogram import Engine

        self.by_sequence = by_sequence
        self.engine = Engine(self.model, batch_dim=1 if by_sequence else None)
        self.weighting = UPGradWeighting()

    def _measure(self) -> tuple[Tensor, Tensor]:
        """Losses with their graph, and the Gram matrix of their gradients."""
        if not self.by_sequence:
            losses = self.losses()
            return losses, self.engine.compute_gramian(losses)
        batch, m = self.batch, self.objectives
        logprobs_BT = self.logprobs()
        parts = [batch.select(torch.tensor([b], device=logprobs_BT.device)) for b in range(batch.batch_size)]
        outputs_MB = torch.stack(
            [
                torch.stack([loss(logprobs_BT[b : b + 1], part, i) for b, part in enumerate(parts)])
                for i in range(m)
            ]
        )
        outputs_MB = outputs_MB / self.tokens
        gramian = self.engine.compute_gramian(outputs_MB)
        # Over the sequences on both sides: <sum_b g_ib, sum_c g_jc>.
        blocks = gramian.reshape(m, len(parts), m, len(parts))
        return outputs_MB.sum(dim=1), blocks.sum(dim=(1, 3))

    def fill_gradients(self) -> None:
        losses, gramian = self._measure()
        losses.backward(self.weighting(gramian))  # type: ignore[no-untyped-call]

    def jacobians(self) -> None:
        """None: it never forms them."""

    def gram(self) -> Tensor:
        return self._measure()[1].detach()


def build(entry: Entry, source: str, batch: Experience, objectives: int, attention: str) -> HfContender:
    """The contender of an entry with stack ``hf``."""
    classes: dict[str, type[HfContender]] = {
        "single": Single,
        "autograd": ByHand,
        "autojac": Autojac,
        "autogram": Autogram,
    }
    return classes[entry.kind](source, batch, objectives, attention, **entry.options)
