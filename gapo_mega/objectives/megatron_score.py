"""A score model that the engine runs, sharded like the policy: for reward models as large as it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from gapo_mega.config import LocalPath, ObjectiveConfig, Section, TemplatePath
from gapo_mega.files import local
from gapo_mega.models.card import card_of
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.location import companions_of
from gapo_mega.objectives.base import Objective, ObjectiveKind, Outline, ScoreModelRequest, TokenScorer
from gapo_mega.objectives.conversation import ConversationTokenizer
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt


class MegatronScoreOptions(Section):
    """``options`` of kind ``megatron_score``."""

    model: LocalPath = Field(
        description="score model of a known family: Hugging Face directory or hub name, or a checkpoint; a "
        "classifier with one label, or a safe-rlhf score model, whose costs are turned into rewards"
    )
    chat_template: TemplatePath | None = Field(
        None, description="Jinja text or .jinja file; none: the model's own"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="longer conversations lose their beginning; none: what the model can take"
    )
    micro_batch_size: int = Field(8, ge=1, description="conversations of a forward pass")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute type")
    offload: bool = Field(False, description="keep the model in host memory between uses (GPU only)")
    sign: Literal[1, -1] = Field(1, description="-1 for a model of costs that does not say so itself")


class MegatronScore(ObjectiveKind):
    """The score of ``options.model``, which the engine runs in the policy's layout on all ranks of a replica.

    Building reads only the model's configuration and tokenizer.
    """

    kind: ClassVar[str] = "megatron_score"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        options = read_options(config, MegatronScoreOptions)
        self._sign = options.sign
        self._scorer: TokenScorer | None = None
        self.wanted_model = _request(options)
        path = local(options.model)
        companions = companions_of(path) if path.is_dir() else options.model
        try:
            hf_config = read_config(companions, "model")
            self._conversations = ConversationTokenizer(
                companions, options.chat_template, options.max_tokens, hf_config.max_position_embeddings
            )
            self._conversations.check_vocabulary(hf_config)
        except ValueError as error:
            raise self._error(f"options: {error}") from error

    @classmethod
    def outline(cls, config: ObjectiveConfig) -> Objective:
        options = read_options(config, MegatronScoreOptions)
        return cls(config) if card_of(options.model) is None else Outline(config.name, _request(options))

    def attach(self, scorer: TokenScorer) -> None:
        self._scorer = scorer

    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Collective: every rank of a replica calls it with the same responses."""
        assert self._scorer is not None, "attach() comes first"
        scores = self._scorer(self._conversations.token_ids(prompts, responses))
        return [self._sign * score for score in scores]


def _request(options: MegatronScoreOptions) -> ScoreModelRequest:
    return ScoreModelRequest(options.model, options.dtype, options.micro_batch_size, options.offload)
