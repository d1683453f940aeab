"""The most that this machine gives: the loops of ceilings.cpp or the kernels of ceilings.cu, compiled here.

Both classes offer ready calls by name. No loop is best on every machine, so there are several of each
kind, and the best of them is the ceiling.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
FLOAT_BYTES = 4
MULTIPLY_ADD_ROUNDS = 1 << 19  # one to two milliseconds

Loops = dict[str, Callable[[], object]]


class Ceilings(Protocol):
    """Ready calls by name; they read rows of any element type as raw memory."""

    compiler: str

    def read(self, rows: Sequence[Tensor], threads: int) -> Loops:
        """Read the rows and do next to nothing with them."""

    def combine(self, out: Tensor, rows: Sequence[Tensor], threads: int) -> Loops:
        """Read the rows and write their sum to ``out``, which may be one of them."""

    def copy(self, target: Tensor, source: Tensor, threads: int) -> Loops:
        """Copy a row."""

    def multiply_add(self, threads: int) -> tuple[Loops, int]:
        """fp64 multiply-adds in registers, and how many; none where arithmetic is no limit."""


def compiler_command(device: str) -> list[str]:
    """The compiler with its options, as far as the device decides them.

    Raises:
        RuntimeError: the compiler is not there.
    """
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        command = ["nvcc", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}"]
    else:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++" if shutil.which("c++") else "g++"]
        command = [*compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    if not shutil.which(command[0]):
        variable = "PATH" if device == "cuda" else "CXX"
        raise RuntimeError(
            f"{variable}: found no compiler {command[0]!r}, accepted: one that compiles the ceilings"
        )
    return command


def compile_library(source: Path, command: Sequence[str]) -> ctypes.CDLL:
    """Compiles into a temporary folder and loads.

    Raises:
        RuntimeError: the compiler's messages.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"lib{source.stem}.so"
        done = subprocess.run([*command, "-o", str(library), str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} {source.name} failed:\n{done.stdout}{done.stderr}")
        # Loaded means mapped: the file may go.
        return ctypes.CDLL(str(library))


def compiler_version(command: Sequence[str]) -> str:
    """The line of the compiler's ``--version`` that names its version: nvcc's last one, else the first."""
    said = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout.splitlines()
    lines = [line for line in said if any(c.isdigit() for c in line) and "Copyright" not in line]
    return lines[0 if command[0] != "nvcc" else -1].strip() if lines else command[0]


def _addresses(rows: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))


def _floats(row: Tensor) -> int:
    """Length in units of four bytes, whatever the elements are."""
    return row.numel() * row.element_size() // FLOAT_BYTES


class CpuCeilings:
    """The loops of ceilings.cpp."""

    # How many elements software prefetching runs ahead; 0 leaves it to the processor.
    AHEAD = (0, 512)

    def __init__(self) -> None:
        command = compiler_command("cpu")
        self.compiler = f"{compiler_version(command)}: {shlex.join(command)}"
        self._library = compile_library(HERE / "ceilings.cpp", command)
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._declare("ceiling_read", ctypes.c_float, pointer, integer, long, integer, integer, long)
        self._declare("ceiling_combine", None, pointer, integer, pointer, long, integer, long)
        self._declare("ceiling_copy", None, pointer, pointer, long, integer, integer)
        self._declare("ceiling_fma", ctypes.c_double, long, integer)
        self._declare("ceiling_fma_count", integer)

    def _declare(self, name: str, result: type | None, *arguments: type) -> None:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, arguments

    def read(self, rows: Sequence[Tensor], threads: int) -> Loops:
        """Two orders of reading, with and without software prefetching."""
        call, addresses, n = self._library.ceiling_read, _addresses(rows), _floats(rows[0])

        def loop(side_by_side: int, ahead: int) -> Callable[[], object]:
            return lambda: call(addresses, len(rows), n, threads, side_by_side, ahead)

        return {
            f"read {order}, prefetch {ahead}": loop(side_by_side, ahead)
            for side_by_side, order in enumerate(("in turn", "side by side"))
            for ahead in self.AHEAD
        }

    def combine(self, out: Tensor, rows: Sequence[Tensor], threads: int) -> Loops:
        """A loop that writes the sum, with and without software prefetching."""
        call, addresses, n = self._library.ceiling_combine, _addresses(rows), _floats(rows[0])

        def loop(ahead: int) -> Callable[[], object]:
            return lambda: call(addresses, len(rows), out.data_ptr(), n, threads, ahead)

        return {f"combine, prefetch {ahead}": loop(ahead) for ahead in self.AHEAD}

    def copy(self, target: Tensor, source: Tensor, threads: int) -> Loops:
        """memcpy and plain stores."""
        call, n = self._library.ceiling_copy, _floats(source)

        def loop(plain: int) -> Callable[[], object]:
            return lambda: call(source.data_ptr(), target.data_ptr(), n, threads, plain)

        return {"copy by memcpy": loop(0), "copy by plain stores": loop(1)}

    def multiply_add(self, threads: int) -> tuple[Loops, int]:
        """Enough of them at once to hide their latency."""
        call, rounds = self._library.ceiling_fma, MULTIPLY_ADD_ROUNDS
        count = rounds * self._library.ceiling_fma_count() * threads
        return {"fp64 multiply-adds": lambda: call(rounds, threads)}, count


class CudaCeilings:
    """The kernels of ceilings.cu, enqueued on the current stream. The number of threads has no meaning."""

    WAVES = (1, 8)  # how often the blocks fill the device
    _BLOCKS = 1 << 16

    def __init__(self) -> None:
        command = compiler_command("cuda")
        self.compiler = f"{compiler_version(command)}: {shlex.join(command)}"
        self._library = compile_library(HERE / "ceilings.cu", command)
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        for name, arguments in {
            "ceiling_read": (pointer, integer, long, integer, integer, pointer, integer, pointer),
            "ceiling_combine": (pointer, integer, pointer, long, integer, pointer),
            "ceiling_copy": (pointer, pointer, long, integer, pointer),
            "ceiling_error": (integer,),
        }.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = integer, arguments
        self._library.ceiling_error.restype = ctypes.c_char_p
        self._sums = torch.empty(self._BLOCKS, device="cuda")

    def _checked(self, name: str, *arguments: object) -> Callable[[], object]:
        call = getattr(self._library, name)
        stream = torch.cuda.current_stream().cuda_stream

        def run() -> None:
            error = call(*arguments, stream)
            if error:
                raise RuntimeError(f"{name}: {self._library.ceiling_error(error).decode()}")

        return run

    def read(self, rows: Sequence[Tensor], threads: int) -> Loops:
        """Two orders of reading, each with few and with many blocks."""
        addresses, n, sums = _addresses(rows), _floats(rows[0]), self._sums.data_ptr()
        return {
            f"read {order}, {waves} waves": self._checked(
                "ceiling_read", addresses, len(rows), n, side_by_side, waves, sums, self._BLOCKS
            )
            for side_by_side, order in enumerate(("in turn", "side by side"))
            for waves in self.WAVES
        }

    def combine(self, out: Tensor, rows: Sequence[Tensor], threads: int) -> Loops:
        """With few and with many blocks."""
        addresses, n = _addresses(rows), _floats(rows[0])
        return {
            f"combine, {waves} waves": self._checked(
                "ceiling_combine", addresses, len(rows), out.data_ptr(), n, waves
            )
            for waves in self.WAVES
        }

    def copy(self, target: Tensor, source: Tensor, threads: int) -> Loops:
        """With few and with many blocks."""
        n = _floats(source)
        return {
            f"copy, {waves} waves": self._checked(
                "ceiling_copy", source.data_ptr(), target.data_ptr(), n, waves
            )
            for waves in self.WAVES
        }

    def multiply_add(self, threads: int) -> tuple[Loops, int]:
        """None: the roofline is drawn on the CPU only."""
        return {}, 0
