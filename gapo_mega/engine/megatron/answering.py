"""The ``AnsweringEngine`` of ``engine/base.py`` over Megatron-core: no gradients, no optimizer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gapo_mega.engine.base import Generator, SamplingParameters
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.generation.generate import MegatronGenerator
from gapo_mega.engine.megatron.model.build import build_gpt
from gapo_mega.engine.megatron.model.forward import batch_logprobs
from gapo_mega.engine.megatron.model.frozen import FrozenModel
from gapo_mega.engine.megatron.model.logprobs import Distribution
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.engine.megatron.score import ScoreModel
from gapo_mega.objectives.base import ScoreModelRequest, TokenScorer
from gapo_mega.planning.setups import AnsweringSetup, LocalModel
from gapo_mega.types import TokenBatch


class MegatronAnswers(groups.Collective):
    """A frozen policy, its generator, and a frozen reference where there is one."""

    def __init__(self, setup: AnsweringSetup, existing: groups.Groups | None = None) -> None:
        """Build the models and load their weights.

        ``existing``: process groups of this layout from an earlier engine; None makes them.
        """
        super().__init__(existing or groups.of_layout(setup.parallel))
        self._models: dict[str, FrozenModel] = {}
        self.take(setup)

    def take(self, setup: AnsweringSetup) -> None:
        self._models.clear()  # frees their memory before other models are built
        self._generator: MegatronGenerator | None = None
        self._setup = setup
        groups.seed(setup.seed)
        with megatron_device():
            self._models["policy"] = self._built(setup.policy, offload=False)
            if setup.reference is not None:
                self._models["reference"] = self._built(setup.reference, setup.model.offload_reference)
        self._generator = MegatronGenerator(
            [self._models["policy"].model],
            self.groups,
            vocabulary=setup.policy.shape.vocab,
            pad_id=setup.pad_id,
            eos_ids=list(setup.eos_ids),
            batch_size=setup.rollout.batch_size,
        )

    def beside(self, setup: AnsweringSetup) -> MegatronAnswers:
        return MegatronAnswers(setup, self.groups)

    def _built(self, model: LocalModel, offload: bool) -> FrozenModel:
        built = build_gpt(model.shape, self._setup.model, self._setup.parallel)
        weights.load(built, model.shape, model.source)
        return FrozenModel(built, offload)

    @property
    def generator(self) -> Generator:
        assert self._generator is not None
        return self._generator

    def logprobs(self, batch: TokenBatch, model: Literal["policy", "reference"]) -> Tensor:
        chosen = self._setup.policy if model == "policy" else self._setup.reference
        assert chosen is not None
        distribution = Distribution.of(chosen.shape.vocab, SamplingParameters.of(self._setup.rollout))
        with megatron_device(), self._models[model].on_device() as built:
            setup = self._setup
            local_BT = batch_logprobs(
                [built], batch, setup.micro_batch, distribution, setup.chunk, setup.micro_batch_tokens
            )
        return self.groups.from_last_stage(local_BT)

    def score_model(self, request: ScoreModelRequest) -> TokenScorer:
        with megatron_device():
            return ScoreModel.requested(request, self._setup.model, self._setup.parallel, self.groups)
