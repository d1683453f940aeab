"""The command line inside the test's own process."""

from __future__ import annotations

import sys

import pytest

from gapo_mega.cli import main


class Here:
    """The command inside this process, where heavy imports have been paid for already."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self._capture.readouterr()
        self._patch.setattr(sys, "argv", ["gapo-mega", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        output = self._capture.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, output.out, output.err

    def refused(self, *arguments: str) -> str:
        """The one line that a user error prints."""
        code, out, err = self(*arguments)
        assert (code, out) == (2, "")
        (line,) = err.strip().splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")
