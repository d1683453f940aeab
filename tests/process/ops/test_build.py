"""The compiled module loads where there is nothing but Python, and what the build says of architectures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from gapo_mega.ops import _native

ROOT = Path(__file__).resolve().parents[3]

needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("cmake")), reason="no nvcc or cmake"
)


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


def configure(
    folder: Path, archs: str | None, compiler: str | None = None
) -> subprocess.CompletedProcess[str]:
    """CMake's first half, which compiles nothing of ours."""
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-DGAPO_CUDA=ON"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += [] if archs is None else [f"-DGAPO_CUDA_ARCHS={archs}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GAPO_")}
    if compiler is not None:
        environment["CUDACXX"] = compiler
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def without(folder: Path, arch: str) -> str:
    """This machine's nvcc, but for an architecture that it does not list."""
    wrapper, nvcc = folder / "nvcc", shutil.which("nvcc")
    wrapper.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --list-gpu-arch ]; then {nvcc} "$1" | grep -v compute_{arch}; exit; fi\n'
        f'exec {nvcc} "$@"\n'
    )
    wrapper.chmod(0o755)
    return str(wrapper)


@needs_nvcc
@pytest.mark.parametrize("archs", ["80;999", "80,90", "sm_90", ""])
def test_architectures_that_the_compiler_lacks_are_one_error(tmp_path: Path, archs: str) -> None:
    done = configure(tmp_path, archs)
    said = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert said.count("CMake Error") == 1
    assert f"GAPO_CUDA_ARCHS: found '{archs}', accepted: numbers that" in said
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    assert all(number in said for number in re.findall(r"compute_(\d+)", known))


@needs_nvcc
@pytest.mark.parametrize(
    ("archs", "lacks", "built"),
    [("90;80;90", "1", "80,90"), (None, "100", "80,90"), ("100;90", "80", "90,100")],
)
def test_the_newest_architecture_comes_last_and_defaults_are_what_there_is(
    tmp_path: Path, archs: str | None, lacks: str, built: str
) -> None:
    done = configure(tmp_path, archs, without(tmp_path, lacks))
    assert f"gapo_mega: CUDA architectures: {built}\n" in done.stdout, done.stderr


@needs_nvcc
def test_a_compiler_that_is_none_is_one_error(tmp_path: Path) -> None:
    done = configure(tmp_path, None, shutil.which("false"))
    assert done.returncode != 0
    assert "--list-gpu-arch fails, accepted: an nvcc from CUDA 11.8 on" in " ".join(done.stderr.split())
