"""Files that lie in a package's folder for the length of a test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def file_in(package: ModuleType, name: str, code: str, folder: Path) -> Iterator[None]:
    """``package`` finds a module ``name`` with ``code``, which is written below ``folder``."""
    folder = folder / package.__name__
    folder.mkdir()
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    before = package.__path__
    package.__path__ = [*before, str(folder)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        package.__path__ = before
        sys.modules.pop(f"{package.__name__}.{name}", None)
