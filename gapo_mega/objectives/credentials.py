"""Headers that carry credentials: where they come from, and that nobody reads them afterwards.

The configuration is written to the run's folder and into its report, so a credential is named there
(``env:NAME`` or ``file:PATH``), never written out. What a service answers may repeat it;
``Credentials.hidden`` takes it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from urllib.parse import unquote

from requests.exceptions import InvalidHeader
from requests.utils import check_header_validity
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from gapo_mega.credentials import IS_A_CREDENTIAL, KEPT, NAMED, NAMES_A_CREDENTIAL, Secrets

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FRAMING = frozenset({"content-length", "transfer-encoding"})


class Credentials:
    """The headers of every request, with the values of environment variables in place of their names.

    Raises what ``error`` makes of a message, without ever showing a value.
    """

    def __init__(self, headers: Mapping[str, str], error: Callable[[str], ValueError]) -> None:
        self._error = error
        self._secrets = Secrets(error)
        self.headers: dict[str, str] = {}
        for name, value in headers.items():
            if name.lower() in {known.lower() for known in self.headers}:
                raise error(f"options: headers.{name}: found in two spellings, accepted: one value a header")
            self.headers[name] = self._value(name, value)

    def hidden(self, text: str) -> str:
        """``text`` without the credentials that a service or a library repeated in it."""
        return self._secrets.hidden(text)

    def proxy(self, value: str | None) -> str | None:
        """The address of the proxy that ``options.proxy`` names."""
        if value is None:
            return None
        where = "options: proxy"
        address = self._secrets.named(where, value)
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
            self._secrets.hide(password)
        return address

    def _value(self, name: str, value: str) -> str:
        where = f"options: headers.{name}"
        found = self._secrets.named(where, value)
        if found is value and (NAMES_A_CREDENTIAL.search(name) or IS_A_CREDENTIAL.match(value.strip())):
            raise self._error(f"{where}: found a value that is written out, accepted: {NAMED} ({KEPT})")
        if found is not value:
            # "Bearer abc" may come back as "abc" alone.
            self._secrets.hide(*found.split())
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
