"""The base of every section of a configuration, and the kinds of text that fields hold."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gapo_mega.files import expanded
from gapo_mega.user_code import resolve

MOST_ROWS = 16  # that a combination takes: so many objectives

# Of an objective, or of what stands for one: keys of the log are made of it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]

Positive = Annotated[float, Field(gt=0)]

_LONGEST_PATH, _LONGEST_PART = 4095, 255  # bytes, of Linux

LARGEST_INTEGER = 2**31 - 1  # what every later use of a count or seed can hold
LARGEST_NUMBER = 3.4028234663852886e38  # of float32


class Section(BaseModel):
    """Base of every section: immutable; unknown keys and numbers that no later stage holds are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits_later_types(cls, value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > LARGEST_INTEGER:
                limits = {"limits": f"a whole number from -{LARGEST_INTEGER} to {LARGEST_INTEGER}"}
                raise PydanticCustomError("integer_range", "{limits}", limits)
            if isinstance(number, float) and abs(number) > LARGEST_NUMBER:
                limits = {"limits": f"a number from -{LARGEST_NUMBER:.3g} to {LARGEST_NUMBER:.3g} (float32)"}
                raise PydanticCustomError("number_range", "{limits}", limits)
        return value


def _resolved(reference: str, info: ValidationInfo) -> str:
    if not info.context:  # built in Python, not read from a file
        return reference
    try:
        return resolve(reference, info.context["folders"])
    except ValueError as error:
        raise PydanticCustomError("user_code", "{accepted}", {"accepted": str(error)}) from None


# A name in the package, or the user's own code: module:NAME, path/to/file.py:NAME. ``loading`` puts the
# absolute path of the user's file in.
Code = Annotated[str, AfterValidator(_resolved)]


def _named(path: str, info: ValidationInfo) -> str:
    if info.context:
        _check_path(path)
    return expanded(path)


def _check_path(path: str) -> None:
    # The empty name would be the working directory. In a section built in Python it may say "none".
    if not path.strip() or "\0" in path:
        raise PydanticCustomError("path", "a name")
    if not _has_room(path):
        raise PydanticCustomError("path", "a name that file systems take, of 255 bytes between slashes")
    if path.splitlines() != [path]:  # errors and logs repeat it, a line each
        raise PydanticCustomError("path", "a name in one line")


def _has_room(path: str) -> bool:
    """Whether a file system could have it: Python's own questions for others raise ``OSError``."""
    raw = path.encode("utf-8", "surrogatepass")
    return len(raw) <= _LONGEST_PATH and all(len(part) <= _LONGEST_PART for part in raw.split(b"/"))


# A file or directory; for models and data it may also be a hub name, which never begins with ~.
LocalPath = Annotated[str, AfterValidator(_named)]


def _template(text: str) -> str:
    return expanded(text) if text.endswith(".jinja") else text


# Jinja text, or the path of a file that ends in .jinja.
TemplatePath = Annotated[str, AfterValidator(_template)]


_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://([^\s?#]+)")


def _address(url: str) -> str:
    found = _ADDRESS.fullmatch(url)
    if found is None or "::" in url:
        # Without the text: it may hold what is secret.
        raise ValueError(
            "found what is no such address, accepted: PROTOCOL://PLACE, without spaces, query and fragment, "
            "as s3://bucket/name or file:///mnt/share/name"
        )
    user, at, _ = found.group(2).partition("/")[0].rpartition("@")
    if at and ":" in user:
        raise ValueError(
            "found a password in it, accepted: none (credentials are where the protocol looks for them: "
            "environment variables, the files of its own tools)"
        )
    return url.rstrip("/")


def protocol_of(url: str) -> str:
    """The part of an ``Address`` before ``://``."""
    return url.partition("://")[0]


# A directory on one of fsspec's file systems.
RemotePath = Annotated[str, AfterValidator(_address)]
