"""The configuration that a run records, beside a ``config.yaml`` that may be the user's own."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from gapo_mega.config import Section
from gapo_mega.config.loading import to_yaml
from gapo_mega.evaluation.files import CONFIG_FILE, RESOLVED_CONFIG_FILE, write_text

logger = logging.getLogger(__name__)

# A copy that somebody has edited has another digest, and is theirs.
_HEAD = "# Written by gapo-mega, which leaves this file alone once it is edited. sha256 of the rest: "


def signed(text: str) -> str:
    """``text`` below a comment that says who wrote it, with a digest of ``text``."""
    return f"{_HEAD}{_digest(text)}\n{text}"


def is_ours(path: Path) -> bool:
    """Whether a run wrote ``path``, and nobody has touched it since."""
    try:
        head, _, rest = path.read_bytes().partition(b"\n")
    except OSError:
        return False
    return head == f"{_HEAD}{hashlib.sha256(rest).hexdigest()}".encode()


def is_free(path: Path) -> bool:
    """Whether a run may write ``path``: it is not there, or a run wrote it."""
    return is_ours(path) or not (path.exists() or path.is_symlink())


def check_config_files(directory: Path) -> None:
    """Raise ``ValueError`` for a ``config.resolved.yaml`` of the user's: readers prefer that name."""
    resolved = directory / RESOLVED_CONFIG_FILE
    if not is_free(resolved):
        raise ValueError(
            f"output_dir: found {resolved}, which no run has written or somebody has edited; accepted: "
            "another output_dir, or move that file"
        )


def record_config(config: Section, directory: Path) -> Path:
    """Write ``config`` with its defaults into ``directory``; the user's own ``config.yaml`` stays."""
    own, resolved = directory / CONFIG_FILE, directory / RESOLVED_CONFIG_FILE
    if is_free(own):
        write_text(own, signed(to_yaml(config)))
        resolved.unlink(missing_ok=True)
        return own
    logger.warning(
        "%s is not as a run has written it, and stays as it is; the run's configuration is in %s",
        own,
        resolved,
    )
    write_text(resolved, signed(to_yaml(config)))
    return resolved


def remove_config(directory: Path) -> None:
    """Remove what runs wrote and nobody edited."""
    for name in (CONFIG_FILE, RESOLVED_CONFIG_FILE):
        if is_ours(directory / name):
            (directory / name).unlink()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
