"""Options of a kind of objective, checked against a section that the kind declares."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError

from gapo_mega.config import ObjectiveConfig, Section
from gapo_mega.config.loading import explain

Options = TypeVar("Options", bound=Section)


def read_options(config: ObjectiveConfig, kind: type[Options], *, with_columns: bool = False) -> Options:
    """``config.options`` as a ``kind``, for kinds that call no Python function.

    Checks as strictly as for a configuration file. Raises ``ValueError`` naming the objective and the option.
    ``with_columns``: the kind reads columns of the data.
    """
    if config.function is not None:
        raise ValueError(
            f"objective {config.name!r}: function: found {config.function!r} with kind {config.kind}, "
            "accepted: none (it belongs to kind python)"
        )
    if config.per_sample:
        raise ValueError(
            f"objective {config.name!r}: per_sample: found true with kind {config.kind}, accepted: false (it "
            "belongs to kind python)"
        )
    if config.columns and not with_columns:
        raise ValueError(
            f"objective {config.name!r}: columns: found {config.columns} with kind {config.kind}, accepted: "
            "none (it reads the conversation)"
        )
    try:
        return kind.model_validate(config.options, strict=True)
    except ValidationError as error:
        message, _ = explain(error, kind)
    raise ValueError(f"objective {config.name!r}: options: {message}")
