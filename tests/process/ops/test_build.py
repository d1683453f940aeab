"""The compiled module loads where there is nothing but Python."""

from __future__ import annotations

import subprocess
import sys

from gapo_mega.ops import _native


def test_the_module_loads_without_torch_and_without_a_driver():
    """Only the dynamic linker and Python: no torch, no CUDA library."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_native', {_native.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "loaded = open('/proc/self/maps').read()\n"
        "assert 'libcuda' not in loaded and 'libtorch' not in loaded\n"
        "from array import array\n"
        "gram, weights = array('d', [1, 0, 0, 1]), array('d', [7, 7])\n"
        "status = module.min_norm(gram.buffer_info()[0], 2, False, weights.buffer_info()[0])\n"
        "print(weights.tolist(), status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0.5, 0.5] 0"
