"""Resolves ``gradients.forward: auto``, and says what cannot be combined in a layout.

``config/strategies/`` has what differs between strategies; this file has what they share.
"""

from __future__ import annotations

from typing import Literal

from gapo_mega.config import Config, strategies
from gapo_mega.config.strategies import PassCount
from gapo_mega.optional import transformer_engine_layers


def minibatch_sequences(config: Config, data_parallel: int) -> int:
    """Sequences of a data-parallel rank in one minibatch."""
    return config.sequences(data_parallel) // config.algorithm.minibatches


def cuts(config: Config) -> bool:
    """Whether responses are drawn from the tokens that top-k or top-p keeps."""
    return config.rollout.top_k > 0 or config.rollout.top_p < 1


def sequences_answered(config: Config, data: int) -> int:
    """The most sequences of a step that a rank answers: ranks that share sequences share out the prompts.

    With top-k or top-p each of them answers all.
    """
    return -(-config.sequences(data) // (1 if cuts(config) else config.parallel.context))


def microbatches(config: Config, data_parallel: int) -> int:
    """Forward passes of a data-parallel rank over one minibatch; with micro_batch_tokens the most it takes.

    First fit puts at least ``most_sequences`` into every row but the last. An interleaved pipeline gets a row
    for each stage, where there are as many sequences.
    """
    sequences = minibatch_sequences(config, data_parallel)
    found = -(-sequences // config.most_sequences)
    if config.micro_batch_tokens is None or config.parallel.virtual_pipeline == 1:
        return found
    return max(found, min(sequences, config.parallel.pipeline))


ForwardKind = Literal["one_pass", "shared", "separate"]


def forward_kind(
    config: Config, data_parallel: int, by_token: bool = False, rows: int | None = None
) -> ForwardKind:
    """The kind of passes of updates that measure ``rows`` gradients; None: those of the run.

    One pass serves all objectives whose advantages are numbers of sequences; ``by_token``: they differ within
    a response, as those of GAE do. Shared passes save m - 1 of m forwards. They reduce every objective's
    gradient once per microbatch instead of once per minibatch, which may cost more than it saves: in that
    case ``auto`` takes separate passes.
    """
    asked = config.gradients.forward
    if asked != "auto":
        return asked
    rows = len(config.rows) if rows is None else rows
    if rows > 1 and not by_token and _one_pass_is_sure(config):
        return "one_pass"
    count = microbatches(config, data_parallel)
    possible = config.parallel.pipeline == 1 and refusal_of_shared(config, count, rows) is None
    return "shared" if possible and (count == 1 or data_parallel == 1) else "separate"


def _one_pass_is_sure(config: Config) -> bool:
    """Whether one pass gives all gradients, without a second try.

    With a pipeline only the last stage sees, after the fact, whether one direction was enough. It is in the
    first update on a rollout, where no ratio is clipped, unless a loss has a KL term.
    """
    if refusal_of_one_pass() or not strategies.chosen(config.gradients).has_one_pass_form:
        return False
    algorithm = config.algorithm
    if config.parallel.pipeline == 1:
        return True
    one_direction = algorithm.kl == "reward" and algorithm.entropy_beta == 0
    return algorithm.ppo_epochs * algorithm.minibatches == 1 and one_direction


def router_passes(config: Config) -> PassCount:
    """What the losses of experts' routers add to an update: one pass, and a forward that counts choices."""
    if not config.model.router_losses:
        return PassCount(0, 0)
    return PassCount(2 if config.model.router_aux_loss > 0 else 1, 1)


def refusal_of_one_pass() -> str | None:
    """Why a model's layers here cannot hand over the gradients of sequences; None if they can."""
    if transformer_engine_layers():
        return "Transformer Engine's layers (they add up the gradients of sequences themselves)"
    return None


def refusal_of_shared(config: Config, count: int, rows: int) -> str | None:
    """Why shared passes over ``count`` microbatches do not give ``rows`` gradients; None if they do."""
    strategy = strategies.chosen(config.gradients)
    if transformer_engine_layers() and strategy.reuses_graph(rows):
        return "Transformer Engine's layers (they drop what a second backward would need)"
    chunk = config.model.logits_chunk
    if chunk != "auto" and chunk > 0:
        return f"model.logits_chunk {chunk} (one graph for several backwards keeps all logits)"
    return strategy.refusal_of_shared(count, config.model.recompute)
