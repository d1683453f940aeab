"""Losses of preference pairs as an experience that the engine takes.

A pair's loss reads nothing but the sums of the log-probabilities of its two responses. At the current
parameters its gradient is therefore ``sum_s c_s grad(sum_t logprob[s, t])`` with one number ``c_s`` for each
sequence, which a forward without a graph gives. With ``-c_s`` for advantages and ``-advantage * logprob`` for
the loss, the engine computes the same gradient with any microbatches and in any layout, and no pair has to
stay together. An objective's numbers are 0 on the pairs of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.config.supervised import PairLossConfig
from gapo_mega.data.encoding import AnswerIds, chat_batch
from gapo_mega.losses import PolicyLoss
from gapo_mega.losses.preference import dpo_losses, ipo_losses
from gapo_mega.types import Experience, TokenBatch


class WeightedLogprobs(PolicyLoss):
    """``-A log pi``: what is minimised has ``-A`` for its gradient by a token's log-probability."""

    name: ClassVar[str] = "weighted_logprobs"

    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        assert batch.advantages_MBT is not None
        terms_BT = batch.advantages_MBT[objective] * logprobs_BT
        return -torch.where(batch.response_mask_BT, terms_BT, 0.0).sum()


@dataclass(frozen=True)
class Pairs:
    """As many pairs of every objective, one objective after the other; chosen and rejected rows in turn."""

    batch: TokenBatch
    margins_MP: Tensor  # float64: what other objectives say for the chosen response

    @classmethod
    def of(cls, pairs: Sequence[Sequence[tuple[AnswerIds, float]]], pad_id: int) -> Pairs:
        """``pairs``: of every objective, each with its margin."""
        rows = [row for some in pairs for both, _ in some for row in both]
        margins = [[margin for _, margin in some] for some in pairs]
        return cls(chat_batch(rows, pad_id), torch.tensor(margins, dtype=torch.float64))


@dataclass(frozen=True)
class Measured:
    """What a batch of pairs gives at the current parameters; float64 on the CPU."""

    losses_MP: Tensor
    rewards_MP2: Tensor  # beta times the log-ratio of policy and reference: chosen, rejected
    slopes_B: Tensor  # derivative of a row's pair's loss by the row's sum of log-probabilities

    def facts(self) -> dict[str, Tensor]:
        """Sums over the pairs, of every objective [M]; a tie is half right."""
        margin_MP = self.rewards_MP2[..., 0] - self.rewards_MP2[..., 1]
        return {
            "loss": self.losses_MP.sum(dim=1),
            "accuracy": ((margin_MP.sign() + 1) / 2).sum(dim=1),
            "margin": margin_MP.sum(dim=1),
            "chosen_reward": self.rewards_MP2[..., 0].sum(dim=1),
            "rejected_reward": self.rewards_MP2[..., 1].sum(dim=1),
        }


def measure(
    pairs: Pairs, policy_BT: Tensor, reference_BT: Tensor, loss: PairLossConfig, weights_M: Sequence[float]
) -> Measured:
    """Losses and their slopes from both models' log-probabilities ``[B, T]``, 0 off the response."""
    mask_BT = pairs.batch.response_mask_BT
    count_B = mask_BT.sum(dim=1).clamp(min=1).double() if loss.length_normalized else 1.0
    policy_B = policy_BT.double().sum(dim=1).requires_grad_()
    ratio_B = (policy_B - reference_BT.double().sum(dim=1)) / count_B
    ratio_MP2 = ratio_B.view(*pairs.margins_MP.shape, 2)
    difference_MP = ratio_MP2[..., 0] - ratio_MP2[..., 1]
    if loss.name == "dpo":
        losses_MP = torch.stack(
            [
                dpo_losses(
                    difference_P,
                    margin_P,
                    beta=loss.beta,
                    weight=weight,
                    label_smoothing=loss.label_smoothing,
                )
                for difference_P, margin_P, weight in zip(
                    difference_MP, pairs.margins_MP, weights_M, strict=True
                )
            ]
        )
    else:
        losses_MP = ipo_losses(difference_MP, beta=loss.beta)
    (slopes_B,) = torch.autograd.grad(losses_MP.sum(), policy_B)
    return Measured(losses_MP.detach(), loss.beta * ratio_MP2.detach(), slopes_B)


def experience_of(
    pairs: Pairs,
    measured: Measured,
    policy_BT: Tensor,
    reference_BT: Tensor,
    total: Callable[[Tensor], Tensor],
) -> Experience:
    """What ``update_policy`` takes with ``WeightedLogprobs``: gradients of every objective's mean loss.

    ``total``: the sum of a tensor over all data ranks.
    """
    batch = pairs.batch
    objectives, own = pairs.margins_MP.shape
    mask_BT = batch.response_mask_BT
    # The engine divides sums by the tokens of all ranks, and the loss is a mean over pairs.
    counts = total(torch.tensor([own, int(mask_BT.sum())], dtype=torch.float64))
    scale = float(counts[1] / counts[0])
    advantages_MB = torch.zeros(objectives, batch.batch_size)
    for objective, rows_B in enumerate(torch.arange(batch.batch_size).view(objectives, -1)):
        advantages_MB[objective, rows_B] = (-scale * measured.slopes_B[rows_B]).float()
    advantages_MBT = advantages_MB[:, :, None] * mask_BT
    return Experience(
        tokens_BT=batch.tokens_BT,
        response_mask_BT=mask_BT,
        group_B=torch.arange(batch.batch_size) // 2,
        old_logprobs_BT=policy_BT,
        ref_logprobs_BT=reference_BT,
        scores_MB=advantages_MB,
        token_rewards_MBT=advantages_MBT,
        advantages_MBT=advantages_MBT,
    )
