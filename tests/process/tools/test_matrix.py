"""What the matrix does to a checkout that other environments use."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from gapo_mega.ops import _native
from tools import matrix


def test_a_module_with_kernels_does_not_lose_them(tmp_path: Path) -> None:
    """The matrix compiles in place, for the Python that ``make`` may have taken, too."""
    module = Path(shutil.copy(_native.__file__, tmp_path))
    kept = "AUTO" if _native.has_cuda else "OFF"
    assert matrix.cuda_setting(sys.executable, [module]) == kept
    broken = tmp_path / "_native.cpython-313-x86_64-linux-gnu.so"
    broken.write_bytes(b"half a build")
    assert matrix.cuda_setting(sys.executable, [broken]) == "OFF"
    assert matrix.cuda_setting(sys.executable, []) == "OFF"
