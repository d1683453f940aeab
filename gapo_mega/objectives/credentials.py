"""Headers that carry credentials: where they come from, and that nobody reads them afterwards.

The configuration is written to the run's folder and into its report, so a credential is named there
(``env:NAME`` or ``file:PATH``), never written out. What a service answers may repeat it;
``Credentials.hidden`` takes it out.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from requests.exceptions import InvalidHeader
from requests.utils import check_header_validity
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from gapo_mega.files import local
from gapo_mega.option_checks import HIDDEN, without_password

logger = logging.getLogger(__name__)

FROM_ENVIRONMENT = "env:"
FROM_FILE = "file:"
_LARGEST_FILE = 1 << 16  # bytes of a file that holds one credential
_SHORTEST_SECRET = 4  # characters; a shorter piece of a credential is a common word
_NAMES_A_CREDENTIAL = re.compile(
    r"authori[sz]ation|authentication|token(?!s($|[-_]))|secret|passw|cookie|credential"
    r"|(^|[-_])(auth|api-?key|key|sig|signature|jwt|pwd)($|[-_])",
    re.IGNORECASE,
)
# "Bearer abc", and the keys of well-known services: OpenAI, Hugging Face, GitHub, Slack, AWS, Google; JWTs.
_IS_A_CREDENTIAL = re.compile(
    r"(?i:bearer|basic|token|digest|negotiate)\s+\S|sk-\w{8}|hf_\w{8}|gh[pousr]_\w{8}|github_pat_\w"
    r"|xox[abeprs]-\w|AKIA[0-9A-Z]{12}|AIza[\w-]{16}|eyJ[\w-]{8,}\.[\w-]{4,}\."
)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FRAMING = frozenset({"content-length", "transfer-encoding"})


class Credentials:
    """The headers of every request, with the values of environment variables in place of their names.

    Raises what ``error`` makes of a message, without ever showing a value.
    """

    def __init__(self, headers: Mapping[str, str], error: Callable[[str], ValueError]) -> None:
        self._error = error
        self._secrets: set[str] = set()
        self.headers: dict[str, str] = {}
        for name, value in headers.items():
            if name.lower() in {known.lower() for known in self.headers}:
                raise error(f"options: headers.{name}: found in two spellings, accepted: one value a header")
            self.headers[name] = self._value(name, value)

    def hidden(self, text: str) -> str:
        """``text`` without the credentials that a service or a library repeated in it."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, HIDDEN)
        return without_password(text)

    def proxy(self, value: str | None) -> str | None:
        """The address of the proxy that ``options.proxy`` names."""
        if value is None:
            return None
        where = "options: proxy"
        address = self._secret(where, value)
        try:
            parsed = parse_url(address or "")
            fits = parsed.scheme in ("http", "https") and bool(parsed.host)
        except LocationParseError:
            fits = False
        if not fits:
            raise self._error(
                f"{where}: found what is no address of a proxy, accepted: http://HOST:PORT, or 'env:NAME' or "
                "'file:PATH' that holds one"
            )
        if parsed.auth is not None:
            if address is value:
                raise self._error(
                    f"{where}: found a password in it, accepted: none ('env:NAME' or 'file:PATH' may "
                    "hold one)"
                )
            _, _, password = unquote(parsed.auth).partition(":")
            self._hide(password)
        return address

    def _value(self, name: str, value: str) -> str:
        where = f"options: headers.{name}"
        found = self._secret(where, value)
        if found is value and (_NAMES_A_CREDENTIAL.search(name) or _IS_A_CREDENTIAL.match(value.strip())):
            raise self._error(
                f"{where}: found a value that is written out, accepted: 'env:NAME', the value of an "
                "environment variable, or 'file:PATH', the text of a file (a run keeps its configuration in "
                "its folder and report)"
            )
        if name.lower() in _FRAMING:
            raise self._error(f"{where}: found, accepted: none (every request has its own)")
        try:
            check_header_validity((name, found))
            found.encode("latin-1")  # what HTTP carries
        except (InvalidHeader, UnicodeEncodeError):  # whose messages show the value, which may be secret
            valid = False
        else:
            valid = _HEADER_NAME.fullmatch(name) is not None
        if not valid:
            raise self._error(
                f"{where}: found a name or value that HTTP does not allow, accepted: one line without spaces "
                "around it, in Latin-1"
            )
        return found

    def _secret(self, where: str, value: str) -> str:
        """What ``env:NAME`` or ``file:PATH`` stands for; any other ``value`` itself, the same object."""
        if value.startswith(FROM_ENVIRONMENT):
            found = self._from_environment(where, value)
        elif value.startswith(FROM_FILE):
            found = self._from_file(where, value)
        else:
            return value
        # "Bearer abc" may come back as "abc" alone.
        self._hide(found, *found.split())
        return found

    def _hide(self, *secrets: str) -> None:
        self._secrets |= {part for part in secrets if len(part) >= _SHORTEST_SECRET}

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


def _first_bytes(path: Path) -> bytes:
    """Of a regular file: a pipe would wait, and a device may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(0, "it is no regular file")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s holds a credential, and others may read it (chmod 600 %s)", path, path)
    with path.open("rb") as file:
        return file.read(_LARGEST_FILE)


def credential_in_query(url: str) -> str | None:
    """The first parameter of an address that is named like a credential."""
    names = (name for name, _ in parse_qsl(parse_url(url).query or "", keep_blank_values=True))
    return next((name for name in names if _NAMES_A_CREDENTIAL.search(name)), None)
