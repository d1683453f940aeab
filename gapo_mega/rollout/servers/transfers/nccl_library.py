"""The few functions of NCCL that a transfer needs, by the library's own interface.

torch.distributed makes communicators for its own processes alone; vLLM's workers join by a bare unique id.
All calls are those of a communicator that does not block (NCCL 2.14 and later): whoever waits for one looks
at it from time to time, and can give it up. https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

_NAME = "libnccl.so.2"  # the one that torch has loaded, where it has
_ID_BYTES = 128
_FLOAT32, _UINT8, _SUM = 7, 1, 0  # of ncclDataType_t and ncclRedOp_t
_SUCCESS, _INVALID_ARGUMENT, _INVALID_USAGE, _IN_PROGRESS = 0, 4, 5, 7  # of ncclResult_t
_MAGIC, _VERSION = 0xCAFEBEEF, 21400  # of ncclConfig_t, as NCCL 2.14 has it; later ones read it, too


class NcclError(RuntimeError):
    """What NCCL says of a call that failed. ``refused``: it would say so again."""

    def __init__(self, told: str, *, refused: bool = False) -> None:
        super().__init__(told)
        self.refused = refused


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * _ID_BYTES)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


class NcclLibrary:
    """Raises ``ValueError`` where there is no NCCL, and ``NcclError`` where a call fails."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_NAME)
        except OSError as error:
            raise ValueError(
                f"rollout.vllm.transfer: found nccl, but {_NAME} does not load ({error}), accepted: files"
            ) from error
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        for name, arguments in {
            "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
            "ncclCommInitRankConfig": [
                ctypes.POINTER(pointer), integer, _UniqueId, integer, ctypes.POINTER(_Config)
            ],
            "ncclBroadcast": [pointer, pointer, size, integer, integer, pointer, pointer],
            "ncclAllReduce": [pointer, pointer, size, integer, integer, pointer, pointer],
            "ncclCommGetAsyncError": [pointer, ctypes.POINTER(integer)],
            "ncclCommAbort": [pointer],
        }.items():  # fmt: skip
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, integer
        for name, argument in {"ncclGetErrorString": integer, "ncclGetLastError": pointer}.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = [argument], ctypes.c_char_p

    def call(self, name: str, *arguments: object) -> None:
        """``arguments`` as in the C function; what it returns is checked."""
        self.check(name, getattr(self._library, name)(*arguments))

    def check(self, what: str, status: int) -> None:
        """Raise unless ``status`` of ``what`` is success, or in progress."""
        if status in (_SUCCESS, _IN_PROGRESS):
            return
        said = (self._library.ncclGetErrorString(status), self._library.ncclGetLastError(None))
        told = " ".join(" ".join(text.decode(errors="replace").split()) for text in said if text)
        raise NcclError(f"{what}: {told}", refused=status in (_INVALID_ARGUMENT, _INVALID_USAGE))

    def unique_id(self) -> bytes:
        """128 bytes by which ranks of a new communicator find one another."""
        made = _UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made)


class Communicator:
    """Rank 0 of ``size``, on the current CUDA device. For one thread, but for ``abort``.

    ``joining`` and ``sending`` are to be iterated to their end, where the work is done: they yield while it
    is under way, and raise ``NcclError`` where it fails.
    """

    def __init__(self, library: NcclLibrary, unique_id: bytes, size: int) -> None:
        self._library = library
        self._id = _UniqueId.from_buffer_copy(unique_id)
        self._size = size
        self._device = torch.cuda.current_device()
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._handle = ctypes.c_void_p()

    def joining(self) -> Iterator[None]:
        """Meet the others, and sum one number with them: the first call of vLLM's workers."""
        config = _Config(ctypes.sizeof(_Config), _MAGIC, _VERSION, 0)
        handle, made_by = ctypes.byref(self._handle), ctypes.byref(config)
        self._library.call("ncclCommInitRankConfig", handle, self._size, self._id, 0, made_by)
        yield from self._answered("ncclCommInitRankConfig")
        with torch.cuda.stream(self._stream):
            one = torch.zeros(1, device=self._device)
        place = one.data_ptr()
        self._library.call("ncclAllReduce", place, place, 1, _FLOAT32, _SUM, self._handle, self._queue)
        yield from self._ran("ncclAllReduce")

    def sending(self, packed: Tensor) -> Iterator[None]:
        """Broadcast uint8 [bytes], which the current stream makes."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        packed.record_stream(self._stream)  # where the wait is given up, its memory is still being read
        place = packed.data_ptr()
        self._library.call(
            "ncclBroadcast", place, place, packed.numel(), _UINT8, 0, self._handle, self._queue
        )
        yield from self._ran("ncclBroadcast")

    def abort(self) -> None:
        """Let go of it once, whatever it does. Waits for the device, which another communicator may hold."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle.value is not None:
            self._library.call("ncclCommAbort", handle)

    def _answered(self, what: str) -> Iterator[None]:
        """Until the host's part is done."""
        state = ctypes.c_int(_IN_PROGRESS)
        while True:
            self._library.call("ncclCommGetAsyncError", self._handle, ctypes.byref(state))
            self._library.check(what, state.value)
            if state.value == _SUCCESS:
                return
            yield

    def _ran(self, what: str) -> Iterator[None]:
        """Until the device's part is done, too."""
        yield from self._answered(what)
        done = self._stream.record_event()
        while not done.query():
            yield from self._answered(what)  # a peer that is lost
            yield

    @property
    def _queue(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._stream.cuda_stream)
