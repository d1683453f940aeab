"""Options of a kind of objective, checked against a section that the kind declares."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError

from gapo_mega.config import ObjectiveConfig, Section
from gapo_mega.config.loading import explain

Options = TypeVar("Options", bound=Section)


def read_options(config: ObjectiveConfig, kind: type[Options]) -> Options:
    """``config.options`` as a ``kind``, for kinds that call no Python function.

    Checks as strictly as for a configuration file. Raises ``ValueError`` naming the objective and the option.
    """
    if config.function is not None:
        raise ValueError(
            f"objective {config.name!r}: function: found {config.function!r} with kind {config.kind}, "
            "accepted: none (it belongs to kind python)"
        )
    try:
        return kind.model_validate(config.options, strict=True)
    except ValidationError as error:
        message, _ = explain(error, kind)
    raise ValueError(f"objective {config.name!r}: options: {message}")
