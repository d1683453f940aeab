"""Credentials in configurations: named by ``env:NAME`` or ``file:PATH``, never written out.

A run keeps its configuration in its folder and report, and tells it to loggers. ``first_written_out`` finds
what must not be there; ``revealed`` gives the values that are named, where they are used; ``hidden`` takes
them out of what people read.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gapo_mega.files import local
from gapo_mega.option_checks import HIDDEN, without_password

logger = logging.getLogger(__name__)

Location = tuple[int | str, ...]

FROM_ENVIRONMENT = "env:"
FROM_FILE = "file:"
NAMED = "'env:NAME', the value of an environment variable, or 'file:PATH', the text of a file"
KEPT = "a run keeps its configuration in its folder and report"
_LARGEST_FILE = 1 << 16  # bytes of a file that holds one credential
_SHORTEST_SECRET = 4  # characters; a shorter piece of a credential is a common word
_SHORTEST_OTHER = 8  # the same, of a value whose name does not say that it is secret
# Names of headers, and of parameters of an address.
NAMES_A_CREDENTIAL = re.compile(
    r"authori[sz]ation|authentication|token(?!s($|[-_])|i[sz])|secret|passw|cookie|credential"
    r"|(^|[-_])(auth|api-?key|key|sig|signature|jwt|pwd)($|[-_])",
    re.IGNORECASE,
)
# "Bearer abc", and the keys of well-known services: OpenAI, Hugging Face, GitHub, Slack, AWS, Google; JWTs.
IS_A_CREDENTIAL = re.compile(
    r"(?i:bearer|basic|token|digest|negotiate)\s+\S|sk-\w{8}|hf_\w{8}|gh[pousr]_\w{8}|github_pat_\w"
    r"|xox[abeprs]-\w|AKIA[0-9A-Z]{12}|AIza[\w-]{16}|eyJ[\w-]{8,}\.[\w-]{4,}\."
)
# The same keys at their full length, anywhere in a text: hf_checkpoints is the name of a folder.
_HOLDS_A_KEY = re.compile(
    r"(?<![\w-])(sk-(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{22,}|xox[abeprs]-\d[\w-]{9,}|AKIA[0-9A-Z]{16}(?!\w)|AIza[\w-]{35}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.)"
)
# Names of options and variables. They end in what they hold: a token_type or password_column is no secret.
_NAMES_A_SECRET = re.compile(
    r"(token|secrets?|passw(or)?ds?|passphrase|cookies?|credentials?|authori[sz]ation"
    r"|(^|[-_.])(pwd|jwt|auth)|(api|access|private|account|encryption|signing|auth)[-_]?keys?)$",
    re.IGNORECASE,
)
_PATH_OF_ONE = re.compile(r"GOOGLE_APPLICATION_CREDENTIALS$")
# Tokens of a vocabulary: eos_token is </s>, and a reward's good_token is +.
_OF_A_VOCABULARY = re.compile(
    r"(^|[-_.])(bos|eos|eot|pad|unk|sep|cls|mask|stop|end|start|begin|special|step|good|bad|yes|no|true|false"
    r"|positive|negative|first|last|next|image|prefix|suffix|per)[-_]?token$",
    re.IGNORECASE,
)
_IN_BRACKETS = re.compile(r"[<\[{(|].*[>\]})|]", re.DOTALL)
# ://user:password@; after the colon of http://host:80/a@b stands a port.
_PASSWORD = re.compile(r"(?<=[\w+.-])://[^/?#@\s:\[\]\"'<>{},]{0,512}:(?!\d+[/?#])([^@\s\"'<>{}]{0,512})@")
# Where mappings have whatever keys their reader takes.
_FREE = frozenset({"options", "environment", "headers"})
_VARIABLE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")


class Secrets:
    """Reads what ``env:NAME`` and ``file:PATH`` stand for, and takes it out of texts.

    Raises what ``error`` makes of a message, without ever showing a value.
    """

    def __init__(self, error: Callable[[str], ValueError] = ValueError) -> None:
        self._error = error
        self._found: set[str] = set()

    def named(self, where: str, value: str, shortest: int = _SHORTEST_SECRET) -> str:
        """What ``env:NAME`` or ``file:PATH`` stands for; any other ``value`` itself, the same object."""
        if value.startswith(FROM_ENVIRONMENT):
            found = self._from_environment(where, value)
        elif value.startswith(FROM_FILE):
            found = self._from_file(where, value)
        else:
            return value
        self.hide(found, shortest=shortest)
        return found

    def hide(self, *secrets: str, shortest: int = _SHORTEST_SECRET) -> None:
        """Take these out of texts, but for those that are too short to be told from common words."""
        self._found |= {part for part in secrets if len(part) >= shortest}

    def hidden(self, text: str) -> str:
        """``text`` without what was named, and without passwords in addresses."""
        for secret in sorted(self._found, key=len, reverse=True):
            text = text.replace(secret, HIDDEN)
        return without_password(text)

    def _from_environment(self, where: str, value: str) -> str:
        variable = value.removeprefix(FROM_ENVIRONMENT)
        found = os.environ.get(variable)
        if not found:
            state = "not set" if found is None else "empty"
            raise self._error(
                f"{where}: found {value!r}, but the environment variable {variable!r} is {state}; accepted: "
                "one that is set"
            )
        return found

    def _from_file(self, where: str, value: str) -> str:
        path = local(value.removeprefix(FROM_FILE))
        try:
            found = _first_bytes(path).decode("utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:  # whose text may show what the file holds
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no text"
            raise self._error(
                f"{where}: found {value!r}, but the file cannot be read ({reason}); accepted: one of a line"
            ) from None
        if not found or len(found) >= _LARGEST_FILE:
            state = "empty" if not found else "too long for a credential"
            raise self._error(f"{where}: found {value!r}, but the file is {state}; accepted: one of a line")
        return found


_OF_OPTIONS = Secrets()  # what this process has read of options and variables


def revealed(where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the values of ``env:NAME`` in place of their names, and of ``file:PATH`` of secrets.

    The name of an option says whether it is one: elsewhere ``file:`` may begin an address.
    Raises ``ValueError`` that begins with ``where`` and the option for a variable or file that is not there.
    """

    def of(place: str, name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: of(f"{place}.{key}", str(key), item) for key, item in value.items()}
        if isinstance(value, list):
            return [of(f"{place}.{index}", name, item) for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        if names_a_secret(name):
            return _OF_OPTIONS.named(place, value)
        if _VARIABLE.fullmatch(value) is None:
            return value
        found = _OF_OPTIONS.named(place, value, _SHORTEST_OTHER)
        _OF_OPTIONS.hide(*map(unquote, _PASSWORD.findall(found)))
        return found

    return {name: of(f"{where}.{name}", name, value) for name, value in options.items()}


def hidden(text: str) -> str:
    """``text`` without what :func:`revealed` has read in this process, and passwords in addresses."""
    return _OF_OPTIONS.hidden(text)


def names_a_secret(name: str) -> bool:
    """Whether an option or a variable of that name holds a secret."""
    if _PATH_OF_ONE.search(name) or _OF_A_VOCABULARY.search(name):
        return False
    return _NAMES_A_SECRET.search(name) is not None


def credential_in_query(url: str) -> str | None:
    """The first parameter of an address in ``url`` that is named like a credential."""
    for word in url.split():
        query = word.partition("://")[2].partition("?")[2]
        names = (part.partition("=")[0] for part in re.split("[?&;#]", query))
        found = next((name for name in map(unquote, names) if NAMES_A_CREDENTIAL.search(name)), None)
        if found is not None:
            return found
    return None


def first_written_out(data: Any) -> tuple[Location, str, str] | None:
    """Where ``data`` of a configuration has a credential, what was found, and what is accepted instead.

    Found are passwords and parameters of addresses and the keys of well-known services in every text, and in
    mappings without a schema what is named like a secret. What was found is told without its value.
    """
    for location, value, before in _texts(data, ()):
        found = _in_an_address(location, value) or _by_its_name(location, value, before)
        if found is not None:
            return location, *found
    return None


def _texts(data: Any, location: Location) -> Iterator[tuple[Location, str, object]]:
    """Every text of ``data``, and what stands before it where it is one of a list."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _texts(value, (*location, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            if isinstance(value, str):
                yield (*location, index), value, data[index - 1] if index else None
            else:
                yield from _texts(value, (*location, index))
    elif isinstance(data, str):
        yield location, data, None


def _in_an_address(location: Location, value: str) -> tuple[str, str] | None:
    """What is wrong with a text wherever it stands."""
    if _PASSWORD.search(value):
        what = "a password in it"
    elif (parameter := credential_in_query(value)) is not None:
        what = f"the parameter {parameter!r}"
    elif _HOLDS_A_KEY.search(value):
        what = "what looks like the key of a service"
    else:
        return None
    if _is_free(location):
        service = "; kind http: headers" if location[-1] == "url" else ""
        return what, f"none ('env:NAME' for the whole text, an environment variable that holds it{service})"
    return what, (
        "none (credentials are where the protocol looks for them: environment variables, the files of its "
        f"own tools; {KEPT})"
    )


def _by_its_name(location: Location, value: str, before: object) -> tuple[str, str] | None:
    """What is wrong with a text that has a secret's name."""
    argument, equals, given = value.partition("=")
    if isinstance(before, str) and before.startswith("--") and not value.startswith("--"):
        argument, equals, given = before, "=", value
    if argument.startswith("--") and equals and _is_secret(argument, given):
        return f"a value of {argument} that is written out", (
            "none (every user of the machine sees arguments; rollout.vllm.environment takes 'env:NAME', and "
            "servers inherit the variables of the run)"
        )
    name = next((str(part) for part in reversed(location) if isinstance(part, str)), "")
    if not _is_free(location) or value.startswith((FROM_ENVIRONMENT, FROM_FILE)):
        return None
    return ("a value that is written out", f"{NAMED} ({KEPT})") if _is_secret(name, value) else None


def _is_free(location: Location) -> bool:
    """Whether it lies in such a mapping; the keys of a sweep's settings are dotted themselves."""
    return not _FREE.isdisjoint(".".join(map(str, location)).split(".")[:-1])


def _is_secret(name: str, value: str) -> bool:
    if not value or not names_a_secret(name):
        return False
    # A short token is a piece of text, as are <s> and [PAD].
    token = name.lower().endswith("token")
    return not (token and (len(value) < _SHORTEST_SECRET or _IN_BRACKETS.fullmatch(value)))


def _first_bytes(path: Path) -> bytes:
    """Of a regular file: a pipe would wait, and a device may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(0, "it is no regular file")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s holds a credential, and others may read it (chmod 600 %s)", path, path)
    with path.open("rb") as file:
        return file.read(_LARGEST_FILE)
