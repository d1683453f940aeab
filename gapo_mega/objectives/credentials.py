"""Headers that carry credentials: where they come from, and that nobody reads them afterwards.

The configuration is written to the run's folder and into its report, so a credential is named there
(``env:NAME``), never written out. What a service answers may repeat it; ``Credentials.hidden`` takes it out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl

from requests import PreparedRequest
from requests.auth import AuthBase
from requests.exceptions import InvalidHeader
from requests.utils import check_header_validity
from urllib3.util import parse_url

FROM_ENVIRONMENT = "env:"
_HIDDEN = "***"
_SHORTEST_SECRET = 4  # characters; a shorter piece of a credential is a common word
_NAMES_A_CREDENTIAL = re.compile(
    r"authori[sz]ation|authentication|token(?!s($|[-_]))|secret|passw|cookie|credential"
    r"|(^|[-_])(auth|api-?key|key|sig|signature|jwt|pwd)($|[-_])",
    re.IGNORECASE,
)
_IS_A_CREDENTIAL = re.compile(r"(bearer|basic)\s+\S", re.IGNORECASE)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FRAMING = frozenset({"content-length", "transfer-encoding"})
_USER_AND_PASSWORD = re.compile(r"(?<=//)[^/@\s]*@")


class ConfiguredOnly(AuthBase):
    """Adds nothing, which keeps requests from adding what ``~/.netrc`` has for the host.

    That would replace a configured Authorization header. Proxies and certificate bundles of the environment
    stay in use: they say how to reach a service, not who asks.
    """

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        return request


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
            text = text.replace(secret, _HIDDEN)
        return without_password(text)

    def _value(self, name: str, value: str) -> str:
        if value.startswith(FROM_ENVIRONMENT):
            value = self._from_environment(name, value)
        elif _NAMES_A_CREDENTIAL.search(name) or _IS_A_CREDENTIAL.match(value):
            raise self._error(
                f"options: headers.{name}: found a value that is written out, accepted: 'env:NAME', the "
                "value of an environment variable (a run keeps its configuration in its folder and report)"
            )
        if name.lower() in _FRAMING:
            raise self._error(f"options: headers.{name}: found, accepted: none (every request has its own)")
        try:
            check_header_validity((name, value))
            value.encode("latin-1")  # what HTTP carries
        except (InvalidHeader, UnicodeEncodeError):  # whose messages show the value, which may be secret
            valid = False
        else:
            valid = _HEADER_NAME.fullmatch(name) is not None
        if not valid:
            raise self._error(
                f"options: headers.{name}: found a name or value that HTTP does not allow, accepted: one "
                "line without spaces around it, in Latin-1"
            )
        return value

    def _from_environment(self, name: str, value: str) -> str:
        variable = value.removeprefix(FROM_ENVIRONMENT)
        found = os.environ.get(variable)
        if not found:
            state = "not set" if found is None else "empty"
            raise self._error(
                f"options: headers.{name}: found {value!r}, but the environment variable {variable!r} is "
                f"{state}; accepted: one that is set"
            )
        # "Bearer abc" may come back as "abc" alone.
        self._secrets |= {part for part in (found, *found.split()) if len(part) >= _SHORTEST_SECRET}
        return found


def without_password(text: str) -> str:
    """``text`` with user and password of every address in it hidden."""
    return _USER_AND_PASSWORD.sub(f"{_HIDDEN}@", text)


def credential_in_query(url: str) -> str | None:
    """The first parameter of an address that is named like a credential."""
    names = (name for name, _ in parse_qsl(parse_url(url).query or "", keep_blank_values=True))
    return next((name for name in names if _NAMES_A_CREDENTIAL.search(name)), None)
