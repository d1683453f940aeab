"""Prompts: read from anywhere ``datasets`` reads, tokenised once.

Every rank has all prompts; with a cache the ranks share their tokenisation. All is a pure function of the
configuration, the tokenizer and the seed. ``data/order.py`` says which of them a rank takes at a step.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from gapo_mega.config import DataConfig
from gapo_mega.data.conversations import heldout_source, training_source
from gapo_mega.data.order import Order
from gapo_mega.data.prompt_encoding import PromptEncoder
from gapo_mega.data.tables import PACKAGE_PREFIX, SPLIT_COLUMN, Source, read_rows
from gapo_mega.data.token_cache import TokenCache
from gapo_mega.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGED_HELDOUT = "heldout"


def load_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    columns: Mapping[str, str] | None = None,
    cache: TokenCache | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and at most ``data.heldout_prompts`` held-out ones, in an order fixed by ``seed``.

    Files with a ``split`` column hold several splits, and that column names each row's; files without it are
    one split. Held-out prompts come from ``data.heldout_source``; without it from the rows marked ``heldout``
    (packaged files), else they are cut from the source. A training prompt that is also held out is left
    out, and so are prompts that are empty, longer than ``data.max_prompt_tokens`` or out of turn; all are
    counted in the log. ``Prompt.index`` is the row's number in its split.

    ``columns``: further columns that prompts keep (``Config.columns``); every source must have them.
    ``cache``: of tokenised prompts; with a shared one the call is collective.

    Raises ``ValueError`` for a missing file, split or column, an unreachable hub, and when nothing is left.
    """
    encoder = PromptEncoder(data, tokenizer, columns, cache)
    sources, elsewhere = prompt_sources(data)
    packaged = [source for source in sources if source.name.startswith(PACKAGE_PREFIX)]
    train = list(chain.from_iterable(_read(encoder, source) for source in sources))
    heldout: list[Prompt] = []
    cut = False
    if elsewhere is not None:
        heldout = _read(encoder, elsewhere)
    elif data.heldout_prompts and packaged:
        marked = [replace(s, split=PACKAGED_HELDOUT, split_parameter=SPLIT_COLUMN) for s in packaged]
        heldout = list(chain.from_iterable(_read(encoder, source) for source in marked))
    elif data.heldout_prompts:
        cut = True
    if data.shuffle:
        random.Random(f"train-{seed}").shuffle(train)
        random.Random(f"heldout-{seed}").shuffle(heldout)
    heldout = _distinct(train if cut else heldout)[: data.heldout_prompts]
    taken = {prompt.token_ids for prompt in heldout}
    kept = [prompt for prompt in train if prompt.token_ids not in taken]
    if not kept:
        raise ValueError(
            f"data.heldout_prompts: found {data.heldout_prompts}, which leaves no training prompt of the "
            f"{len(train)} "
            f"in {data.source!r}; accepted: fewer, or a data.heldout_source"
        )
    logger.info(
        "prompts: %d for training, %d held out (%d training rows left out because they are held out)",
        len(kept),
        len(heldout),
        len(train) - len(kept),
    )
    return kept, heldout


def load_questions(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """The distinct prompts of the source ``name``, its first ``limit`` if that is given, in its order.

    ``data`` says how they are read; its split and subset are those of held-out prompts. Errors as
    ``load_prompts``.
    """
    packaged = name.startswith(PACKAGE_PREFIX)
    source = replace(
        heldout_source(name, PACKAGED_HELDOUT if packaged else data.heldout_split, data.heldout_subset),
        parameter="--prompts",
    )
    return _distinct(_read(PromptEncoder(data, tokenizer, columns), source))[:limit]


@dataclass(frozen=True)
class PromptPosition:
    """Where a run stands in its prompts, as its checkpoint holds it. The same on every rank."""

    step: int  # the next one to take
    prompts_per_step: int
    prompts: str  # fingerprint of the prompts and of what orders them

    @classmethod
    def of(cls, prompts: Sequence[Prompt], order: Order, step: int) -> PromptPosition:
        """The position before ``step`` of ``order`` over ``prompts``."""
        digest = hashlib.sha256(f"{order.seed} {order.shuffle}".encode())
        for prompt in prompts:
            digest.update(repr(prompt.token_ids).encode())
        return cls(step, order.batch_size, digest.hexdigest()[:16])

    def check_same_prompts(self, saved: PromptPosition) -> None:
        """Raise ``ValueError`` if ``saved``, from a checkpoint, has other prompts or another step size."""
        for key, name in (("prompts_per_step", "rollout.prompts_per_step"), ("prompts", "data or seed")):
            theirs, mine = getattr(saved, key), getattr(self, key)
            if theirs != mine:
                raise ValueError(
                    f"{name}: the checkpoint was written with other prompts ({key} {theirs}, found {mine}); "
                    "accepted: the configuration of the run that is resumed, or checkpoint.resume=false"
                )


def prompt_sources(data: DataConfig) -> tuple[list[Source], Source | None]:
    """Where training prompts come from, and held-out ones, if not from there too."""
    names = [data.source] if isinstance(data.source, str) else data.source
    heldout = None
    if data.heldout_prompts and data.heldout_source is not None:
        heldout = heldout_source(data.heldout_source, data.heldout_split, data.heldout_subset)
    return [training_source(name, data.split, data.subset) for name in names], heldout


def _read(encoder: PromptEncoder, source: Source) -> list[Prompt]:
    """The usable prompts of one split of one source, in the source's order."""
    table = read_rows(source)
    prompts = encoder.all_of(table)
    if not prompts:
        raise ValueError(
            f"{source.parameter}: no prompt of {source.name!r} ({source.split_parameter} {source.split!r}) "
            f"is left of {len(table)} rows, {encoder.left_out()}; accepted: another source or a larger "
            "data.max_prompt_tokens"
        )
    return prompts


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    def first_ones() -> Iterator[Prompt]:
        seen: set[tuple[int, ...]] = set()
        for prompt in prompts:
            if prompt.token_ids not in seen:
                seen.add(prompt.token_ids)
                yield prompt

    return list(first_ones())
