"""Compiles the extension with the CUDA sources as plain C++, against the headers of ``include/``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"

FLAGS = [
    *("-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0"),
    "-ffp-contract=off",
    "-DGAPO_HAS_CUDA=1",
    '-DGAPO_CUDA_ARCHS="0"',
    # Both modules live in one process, and pybind11 knows its classes by their C++ names.
    "-Dgapo=gapo_emulated",
]
# What the emulator reports as it does its own findings, so without the checks' runtime library.
CHECKS = ["-fsanitize=alignment,null,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]
# Variables without a value get one that shows: some -1e303, or an index far outside. Not in GCC before 12.
FILL = "-ftrivial-auto-var-init=pattern"


def compiler() -> list[str]:
    """The command, as Makefiles understand CXX."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _accepts(flag: str) -> bool:
    command = [*compiler(), flag, "-Werror", "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")


def build(folder: Path, csrc: Path = CSRC) -> Path:
    """The module ``_native`` in ``folder``, built from the sources in ``csrc``."""
    kernels = [*sorted((csrc / "cuda").glob("*.cu")), HERE / "faults.cu"]
    plain = [csrc / "bindings.cpp", csrc / "runs.cpp", *sorted(HERE.glob("*.cpp"))]
    # Without GAPO_X86 there is the baseline only, and the files of other instruction sets are left out.
    plain += [path for path in sorted((csrc / "cpu").glob("*.cpp")) if not path.stem.startswith("avx")]
    plain += sorted((csrc / "cuda").glob("*.cpp"))
    includes = [HERE / "include", csrc, pybind11.get_include(), sysconfig.get_paths()["include"]]
    checks = [*CHECKS, FILL] if _accepts(FILL) else CHECKS
    common = [*FLAGS, *(f"-I{path}" for path in includes)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.name}.o"
        # The bindings and the CPU's kernels take long to compile, and nothing here waits for them.
        level = "-O0" if source.name in ("bindings.cpp", "baseline.cpp") else "-O1"
        extra = checks if source in kernels else []
        _run([*compiler(), *common, level, *extra, "-c", source, "-o", target])
        return target

    # The longest begin first.
    sources = sorted([*kernels, *plain], key=lambda path: path.name not in ("bindings.cpp", "gramian.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compilers are processes of their own
        objects = dict(zip(sources, pool.map(compile_one, sources), strict=True))
    module = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Of an inline function that both have, the linker keeps the first: the one with the checks.
    in_order = [objects[source] for source in [*kernels, *plain]]
    _run([*compiler(), "-shared", "-o", module, *in_order, "-pthread"])
    return module
