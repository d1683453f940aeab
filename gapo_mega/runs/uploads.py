"""Puts the exported model where ``checkpoint.export_to`` says, through fsspec: an object store, a share.

A reader sees a whole model or none: ``config.json``, which makes a model of a directory, goes first and comes
last.
``UPLOADED`` beside it says which run has put it there and lists its files; a model without it is nobody's to
replace. Credentials are the protocol's own matter, and no message repeats one.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_not_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from gapo_mega.config.fields import protocol_of
from gapo_mega.option_checks import without_password
from gapo_mega.scratch import MADE_BY, size_of
from gapo_mega.whereabouts import get_on

logger = logging.getLogger(__name__)

PARAMETER = "checkpoint.export_to"
UPLOADED = "gapo-mega-export.json"
_CONFIG = "config.json"
_LAST = ("model.safetensors.index.json", UPLOADED, _CONFIG)  # in this order, after all others
_ATTEMPTS, _LONGEST_PAUSE = 5, 30.0  # seconds; the first one is 1, and each twice the one before
_FINAL = (PermissionError, NotImplementedError)  # another attempt does not mend these
# Of which a folder is no thing to make: asking for one may make a bucket.
_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"})
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")  # of signed addresses
_NAME = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


@dataclass(frozen=True)
class Place:
    """A directory on one of fsspec's file systems. Methods raise what the library says."""

    url: str
    files: Any
    root: str

    @classmethod
    def of(cls, url: str) -> Place:
        """Raises ``ValueError`` for a protocol that is not known, or whose package is not installed."""
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations, registry

        protocol = protocol_of(url)
        if protocol not in known_implementations and protocol not in registry:
            raise ValueError(
                f"{PARAMETER}: found the protocol {protocol!r}, accepted: one that fsspec knows, such as s3, "
                "gs, abfs, sftp or file"
            )
        try:
            files, root = url_to_fs(url)
        except ImportError as error:
            raise ValueError(
                f"{PARAMETER}: found {url}, and the package for {protocol} is not usable ({_told(error)}); "
                "accepted: that package installed, or null, with which the model is exported to hf/ alone"
            ) from None
        except Exception as error:  # of any library, such as for credentials that are not there
            raise ValueError(f"{PARAMETER}: found {url}, which cannot be used ({_told(error)})") from None
        return cls(url, files, str(root).rstrip("/"))

    def path(self, name: str) -> str:
        """Of a file in the directory."""
        return f"{self.root}/{name}"

    def is_below(self, directory: Path) -> bool:
        """Whether it is ``directory``, or in it, on this machine."""
        from fsspec.implementations.local import LocalFileSystem

        here = isinstance(self.files, LocalFileSystem)
        return here and Path(self.root).resolve().is_relative_to(directory.resolve())

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        self.files.invalidate_cache()
        return bool(self.files.exists(self.path(name)))

    def put(self, source: Path, name: str) -> None:
        """Write a file, and look whether all of it is there."""
        self._make_folders(name)
        self.files.put_file(str(source), self.path(name))
        self._check_size(name, source.stat().st_size)

    def write(self, name: str, text: str) -> None:
        """Write a short text."""
        self._make_folders(name)
        self.files.pipe_file(self.path(name), text.encode())
        self._check_size(name, len(text.encode()))

    def remove(self, name: str) -> None:
        """Remove the file if it is there."""
        if self.has(name):
            self.files.rm_file(self.path(name))

    def uploaded(self) -> Mapping[str, Any]:
        """What ``UPLOADED`` says; empty where there is none that we have written."""
        if not self.has(UPLOADED):
            return {}
        try:
            found = json.loads(self.files.cat_file(self.path(UPLOADED)))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def try_writing(self) -> None:
        """Write a small file, and remove it again with the folders that had to be made for it."""
        name = f".gapo-mega-{uuid.uuid4().hex}"
        made = self._missing_folders()
        try:
            self.write(name, "gapo-mega tries whether it may write here\n")
        finally:
            self.remove(name)
            for folder in made:
                if self.files.exists(folder):
                    self.files.rmdir(folder)

    def _check_size(self, name: str, size: int) -> None:
        get_on()
        self.files.invalidate_cache()
        found = self.files.info(self.path(name))["size"]
        if found != size:
            raise OSError(f"{name} has {found} bytes there, and {size} here")

    def _make_folders(self, name: str) -> None:
        if protocol_of(self.url) not in _STORES:
            self.files.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)

    def _missing_folders(self) -> list[str]:
        """Of those that the directory lies in, the innermost first."""
        found, folder = [], self.root
        while protocol_of(self.url) not in _STORES and folder and not self.files.exists(folder):
            found.append(folder)
            folder = folder.rpartition("/")[0]
        return found


class Export:
    """Where the exported model of one run goes."""

    def __init__(self, url: str, known_by: Collection[str]) -> None:
        """``known_by``: runs whose model may be replaced; ``put`` takes the first one for this run."""
        self.url = url
        self.known_by = list(known_by)

    def check(self, directory: Path) -> None:
        """Refuse a place that cannot be written to, or that has another model. Leaves nothing there.

        ``directory``: the run's. Raises ``ValueError``.
        """
        place = Place.of(self.url)
        try:
            if place.is_below(directory):
                raise ValueError(
                    f"{PARAMETER}: found {self.url}, which is in the run's directory; accepted: a "
                    "place beside it, or null (the model is exported to hf/ there anyway)"
                )
            self._check_mine(place)
            place.try_writing()
        except ValueError:
            raise
        except Exception as error:  # of any library
            raise ValueError(
                f"{PARAMETER}: found {self.url}, which cannot be written to ({_told(error)}); accepted: a "
                "directory to write to, or null"
            ) from None

    def put(self, directory: Path, step: int) -> None:
        """Put the model in ``directory`` there; it is of ``step``.

        Raises ``ValueError`` where that has failed, after several attempts. ``directory`` stays as it is.
        """
        place = Place.of(self.url)
        try:
            self._check_mine(place)
            self._put(place, directory, step)
        except ValueError:
            raise
        except Exception as error:  # of any library
            raise ValueError(
                f"{PARAMETER}: the model could not be put to {self.url} ({_told(error)}); it is whole in "
                f"{directory}; accepted: the same command, which tries again, or to copy that directory"
            ) from None
        logger.info("the model of step %d is at %s", step, self.url)

    def _put(self, place: Place, directory: Path, step: int) -> None:
        logger.info("putting %s (%.1f MB) to %s", directory, size_of(directory) / 1e6, self.url)
        names = names_in(directory)
        older = place.uploaded().get("files", [])
        for name in (_CONFIG, UPLOADED, *(str(name) for name in older if name not in names)):
            if _NAME.fullmatch(name) and ".." not in name.split("/"):
                _again(partial(place.remove, name))
        for name in names:
            if name != _CONFIG:
                _again(partial(place.put, directory / name, name))
        note = {"run": self.known_by[0], "step": step, "files": names}
        _again(partial(place.write, UPLOADED, json.dumps(note, indent=1) + "\n"))
        _again(partial(place.put, directory / _CONFIG, _CONFIG))

    def _check_mine(self, place: Place) -> None:
        if not (place.has(_CONFIG) or place.has(UPLOADED)):
            return
        if place.uploaded().get("run") not in self.known_by:
            raise ValueError(
                f"{PARAMETER}: found {self.url}, where there is a model that this run has not put there; "
                "accepted: another place, or to remove that model"
            )


def names_in(directory: Path) -> list[str]:
    """The files of a model, in the order in which they may be written where somebody reads.

    Links count as what they lead to: where they go there may be none.
    """
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(set(found) - {MADE_BY}, key=lambda name: (_LAST.index(name) if name in _LAST else -1, name))


def _again(work: Callable[[], object]) -> None:
    """Do ``work``; after an error once more, a few times."""
    for attempt in Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential(max=_LONGEST_PAUSE),
        retry=retry_if_not_exception_type(_FINAL),
        before_sleep=_tell,
        reraise=True,
    ):
        with attempt:
            work()


def _tell(state: RetryCallState) -> None:
    error = None if state.outcome is None else state.outcome.exception()
    assert error is not None and state.next_action is not None, "called after a failure"
    logger.warning(
        "%s: attempt %d of %d failed (%s); again in %.0f s",
        PARAMETER, state.attempt_number, _ATTEMPTS, _told(error), state.next_action.sleep,
    )  # fmt: skip


def _told(error: BaseException) -> str:
    """An error of a library on one line, without what may be secret in an address."""
    text = " ".join(str(error).split())[:300]
    return without_password(_QUERY.sub(r"\1?***", f"{type(error).__name__}: {text}" if text else repr(error)))
