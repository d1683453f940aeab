"""Refuses everything that can be refused before a model is built or a process started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gapo_mega import advantages, aggregation, losses, objectives, scalarization
from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.aggregation.base import Aggregator
from gapo_mega.config import Config
from gapo_mega.config.lora import LoraConfig
from gapo_mega.data.preview import preview_prompts, unchecked
from gapo_mega.files import local
from gapo_mega.losses.base import PolicyLoss
from gapo_mega.models.adapters import AdapterNames
from gapo_mega.models.card import Card, card_of
from gapo_mega.models.huggingface import location
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.directory import HFDirectory
from gapo_mega.models.huggingface.location import companions_of
from gapo_mega.models.huggingface.peft_adapter import PeftAdapter
from gapo_mega.models.huggingface.token_ids import check_tokens, has_tokenizer
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.models.registry import shape_of
from gapo_mega.models.score_head import require_language_model, score_head_of
from gapo_mega.models.shape import ModelShape
from gapo_mega.objectives.base import Objective, ScoreModelRequest
from gapo_mega.planning.layout import check_layout, check_lengths, check_model_split, check_packages
from gapo_mega.planning.methods import check_kind
from gapo_mega.planning.resolved import ModelSource, ResolvedRun, ScoreModelSource
from gapo_mega.rollout import backends
from gapo_mega.runs.log import check_logging
from gapo_mega.runs.plugins import check_estimator, made_up_batch, shown
from gapo_mega.scalarization.base import Gives, Scalarizer, Weighted
from gapo_mega.scalarization.safe import SafeWeights

# Fields in which a value model's backbone may differ from the policy: its head replaces the output layer, and
# families of one shape store the same tensors. Only the lengths that occur must fit.
_FREE_IN_A_CRITIC = ("family", "tied", "max_positions", "sliding_window")


def resolve(config: Config, world_size: int, *, shapes_only: bool = False) -> ResolvedRun:
    """The run that ``config`` describes on ``world_size`` processes. Reads no weights and no data.

    ``shapes_only``: for a plan, in which a packaged card may stand for a model that is not on this machine,
    and which needs nothing that only the run will need (``check_here``).
    Raises ``ValueError`` for the first thing that does not fit together.
    """
    models = _Configurations(shapes_only)
    shape = _policy_shape(models, config.model.path)
    estimator = advantages.build(config.advantages.name, **config.advantages.options)
    check_layout(config, shape, world_size, estimator)
    check_estimator(config, estimator)
    check_logging(config.logging, packages=not shapes_only)
    backends.check(config)
    check_kind("aggregation", config.aggregation.name)
    if config.scalarization is not None:
        check_kind("scalarization", config.scalarization.name)
    if not shapes_only:
        check_here(config)
        check_adapter(config.model.lora, shape)
    aggregator, loss = build_aggregator(config), _loss(config)
    built = objectives.build_all(config.objectives, outlines=shapes_only)
    return ResolvedRun(
        config=config,
        world=world_size,
        policy=ModelSource(config.model.path, shape),
        critic=_critic(models, config, shape, estimator),
        objectives=built,
        score_models=_score_models(models, config, built, world_size),
        aggregator=aggregator,
        estimator=estimator,
        loss=loss,
        cards=models.cards,
        scalarizer=_scalarizer(config, estimator),
    )


def check_here(config: Config) -> None:
    """Raise ``ValueError`` for packages and programs that the run needs and that this machine has not."""
    check_packages(config.parallel)
    check_logging(config.logging)
    backends.check_here(config)


def check_adapter(lora: LoraConfig | None, shape: ModelShape) -> None:
    """Raise ``ValueError`` where the adapter to start from is none, or another than the settings say."""
    if lora is not None and lora.path is not None:
        names = AdapterNames(shape, lora)
        expected = {names.source(name): names.size(name) for name in names.names()}
        PeftAdapter(local(lora.path), lora).check(expected)


def check_answering(config: Config, path: str, parameter: str, world_size: int) -> ModelShape:
    """The shape of a language model that answers in the configuration's layout and lengths.

    Raises ``ValueError``, beginning with ``parameter``, where it does not fit.
    """
    shape = check_language_model(path, parameter)
    with _errors_of(parameter):
        check_model_split(config.parallel, shape, config.model.dtype, world_size)
        check_packages(config.parallel)
        check_lengths(config, shape)
    return shape


def check_language_model(path: str, parameter: str) -> ModelShape:
    """The shape of a language model. Raises ``ValueError``, beginning with ``parameter``, for other paths."""
    with _errors_of(parameter):
        shape = _policy_shape(_Configurations(False), path)
        _check_weights(path)
    return shape


def check_score_models(config: Config, built: Sequence[Objective], world_size: int) -> None:
    """Raise ``ValueError`` for a score model of the objectives that is none or does not fit the layout."""
    _score_models(_Configurations(False), config, built, world_size)


def preview(config: Config, *, shapes_only: bool = False) -> list[str]:
    """Read the first rows of the run's data; one line about each source. Errors as ``preview_prompts``.

    ``shapes_only``: as for ``resolve``; prompts need the policy's tokenizer, which a card has not.
    """
    if shapes_only and card_of(config.model.path) is not None:
        return unchecked(config.data, f"the tokenizer of {config.model.path} is not on this machine")

    @cache
    def tokenizer() -> PreTrainedTokenizerBase:
        return read_tokenizer(companions_of(location.resolve(config.model.path)))

    return preview_prompts(config.data, tokenizer, config.columns)


def build_aggregator(config: Config) -> Aggregator:
    """The method, asked once: any Gram matrix exposes options for another number of objectives."""
    if config.one_signal is not None:
        return aggregation.build("weighted_sum")  # of one gradient
    if config.scalarization is not None:
        return SafeWeights()
    name = config.aggregation.name
    aggregator = aggregation.build(name, **config.aggregation.options)
    aside = f"; algorithm.kl objective has the rows {', '.join(config.aggregated)}"
    with _errors_of(f"aggregation.options ({name})", aside if config.algorithm.kl == "objective" else ""):
        aggregator(torch.eye(len(config.aggregated), dtype=torch.float64))
    if aggregator.looks_at_scores and len(config.aggregated) > len(config.objectives):
        raise ValueError(
            f"algorithm.kl: found {config.algorithm.kl} with aggregation.options ({name}) that look at "
            "scores, accepted: reward, loss, apart (the KL's row has no scores)"
        )
    return aggregator


def _scalarizer(config: Config, estimator: AdvantageEstimator) -> Scalarizer | None:
    """The run's scalarizer, told the objectives' names and asked once on a made-up batch."""
    if config.scalarization is None:
        return None
    name, samples = config.scalarization.name, config.rollout.samples_per_prompt
    scalarizer = scalarization.build(name, **config.scalarization.options)
    with _errors_of(f"scalarization.options ({name})"):
        scalarizer.prepare([objective.name for objective in config.objectives])
    gives = getattr(type(scalarizer), "gives", None)
    if gives not in get_args(Gives):
        raise ValueError(
            f"scalarization.name: found {name}, whose class attribute gives is {gives!r}; accepted: "
            f"{', '.join(get_args(Gives))}"
        )
    safe = isinstance(scalarizer, Weighted) and scalarizer.safe
    if safe is not config.scalarization.safe:
        raise ValueError(
            f"scalarization.options.safe: found {safe!r} in the scalarizer {name}, accepted: true or false, "
            "as the configuration has it"
        )
    # One that gives advantages compares the KL reward with that of other samples.
    least = max(scalarizer.least_samples, 2 if scalarizer.gives == "advantages" else 1)
    if samples < least:
        raise ValueError(
            f"rollout.samples_per_prompt: found {samples}, accepted with scalarization.name {name}: {least} "
            "or more, because a sample is compared with the others of its prompt"
        )
    if estimator.needs_values and not isinstance(scalarizer, Weighted):
        raise ValueError(
            f"advantages.name: found {config.advantages.name} with scalarization.name {name}, accepted: an "
            "estimator without a critic (values are those of the objectives, and this scalarizer gives no "
            "weights for them)"
        )
    if estimator.needs_greedy and config.one_signal is not None:
        raise ValueError(
            f"advantages.name: found {config.advantages.name} with scalarization.name {name}, accepted: an "
            "estimator without greedy responses (their scores are those of the objectives)"
        )
    _ask(scalarizer, len(config.objectives), samples)
    return scalarizer


def _ask(scalarizer: Scalarizer, objectives: int, samples: int) -> None:
    """Raise ``ValueError`` unless the scalarizer gives one finite number a response."""
    generator = torch.Generator().manual_seed(0)
    scores_MB = torch.randn(objectives, 2 * samples, generator=generator)
    group_B = torch.arange(2).repeat_interleave(samples)
    lengths_B = torch.arange(1, 2 * samples + 1)
    if isinstance(scalarizer, Weighted):
        coefficients: object = scalarizer.coefficients(scores_MB, group_B, lengths_B)
        if not isinstance(coefficients, Tensor) or coefficients.shape != (objectives,):
            raise ValueError(
                f"scalarization.name: found {scalarizer.name}, whose coefficients are "
                f"{shown(coefficients)}, accepted: a tensor of one number an objective, here {[objectives]}"
            )
    found: object = scalarizer(scores_MB, group_B, lengths_B)
    fits = isinstance(found, Tensor) and found.shape == group_B.shape and bool(found.isfinite().all())
    if not fits:
        raise ValueError(
            f"scalarization.name: found {scalarizer.name}, which gives {shown(found)}, accepted: a "
            f"scalarizer that gives a tensor of one finite number a response, here {list(group_B.shape)}"
        )


def _loss(config: Config) -> PolicyLoss:
    """The loss, called once on a made-up batch: one of the user's own may give anything."""
    loss = losses.build(config.loss.name, **config.loss.options)
    logprobs_BT = torch.full((2, 4), -1.0, requires_grad=True)
    found: object = loss(logprobs_BT, made_up_batch(len(config.objectives)), 0)
    if isinstance(found, Tensor) and found.ndim == 0 and found.requires_grad:
        return loss
    gives = shown(found)
    if isinstance(found, Tensor) and not found.requires_grad:
        gives += " without a graph"
    raise ValueError(
        f"loss.name: found {config.loss.name}, which gives {gives}, accepted: a loss that gives a scalar "
        "with a graph to the log-probabilities"
    )


class _Configurations:
    """Reads configurations of models, or packaged cards where those may stand for them.

    Attributes:
        cards: that were read, by what names the model.
    """

    def __init__(self, with_cards: bool) -> None:
        self._with_cards = with_cards
        self.cards: dict[str, Card] = {}

    def read(self, path: str, parameter: str) -> PreTrainedConfig:
        """The configuration of the model in a directory, checkpoint or hub repository."""
        card = card_of(path) if self._with_cards else None
        if card is None:
            return read_config(companions_of(local(path)))
        self.cards[parameter] = card
        return card.config


def _critic(
    models: _Configurations, config: Config, policy: ModelShape, estimator: AdvantageEstimator
) -> ModelSource | None:
    """The value models' backbone, which has the policy's shape: they read the policy's tokens."""
    if not estimator.needs_values:
        return None
    path = config.critic.path
    if path is None:
        return ModelSource(config.model.path, policy)
    with _errors_of("critic.path"):
        found = shape_of(models.read(path, "critic.path"))
        _check_weights(path)
        _check_backbone(path, found, policy)
    if config.longest > found.longest:
        raise ValueError(
            f"critic.path: found {path} for sequences of at most {found.longest} tokens, accepted: one for "
            f"the {config.longest} of data.max_prompt_tokens + rollout.max_new_tokens"
        )
    return ModelSource(path, policy, "critic.path")


def _check_backbone(path: str, found: ModelShape, policy: ModelShape) -> None:
    for field in dataclasses.fields(ModelShape):
        mine, wanted = getattr(found, field.name), getattr(policy, field.name)
        if mine != wanted and field.name not in _FREE_IN_A_CRITIC:
            raise ValueError(
                f"found {path} with {field.name} {mine}, accepted: a backbone of the policy's shape, with "
                f"{field.name} {wanted}"
            )


def _score_models(
    models: _Configurations, config: Config, built: Sequence[Objective], world_size: int
) -> list[ScoreModelSource]:
    return [
        ScoreModelSource(
            objective.wanted_model,
            _score_shape(models, config, objective.name, objective.wanted_model, world_size),
        )
        for objective in built
        if objective.wanted_model is not None
    ]


def _score_shape(
    models: _Configurations, config: Config, objective: str, request: ScoreModelRequest, world_size: int
) -> ModelShape:
    path = request.path
    with _errors_of(f"objective {objective!r}: its score model {path}"):
        shape = shape_of(models.read(path, f"objective {objective!r}: options: model"))
        # A reward model without experts may score for a policy that has them.
        parallel = config.parallel if shape.experts is not None else config.parallel.of_dense()
        check_model_split(parallel, shape, request.dtype or config.model.dtype, world_size)
        directory = _check_weights(path)
        if directory is not None and score_head_of(directory.config, directory.names) is None:
            raise ValueError("found a language model, accepted: a model with one score a text")
    return shape


def _check_weights(path: str) -> HFDirectory | None:
    """The local Hugging Face directory at ``path``, which must have weights; None for all else.

    A checkpoint says what it lacks when it is loaded, and a hub repository when it is downloaded.
    """
    directory = local(path)
    return HFDirectory(directory) if os.path.isfile(directory / "config.json") else None


@contextmanager
def _errors_of(what: str, aside: str = "") -> Iterator[None]:
    """Let errors in the block begin with ``what``; those who read models know no name but ``model.path``.

    ``aside`` follows them.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {str(error).removeprefix('model.path: ')}{aside}") from error


def _policy_shape(models: _Configurations, path: str) -> ModelShape:
    """The shape of the policy: a language model whose tokenizer has no token beyond its vocabulary.

    A hub repository's tokenizer is checked once it is downloaded.
    """
    companions = companions_of(local(path))
    config = models.read(path, "model.path")
    require_language_model(config)
    shape = shape_of(config)
    if has_tokenizer(companions):
        check_tokens(companions, read_tokenizer(companions), shape.vocab)
    return shape
