"""The few functions of NCCL that a transfer needs, from the library that torch has loaded.

torch.distributed makes communicators for its own processes alone; vLLM's workers join by a bare unique id.
Signatures: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_NAME = "libnccl.so.2"
_ID_BYTES = 128
_FLOAT32, _UINT8, _SUM = 7, 1, 0  # of ncclDataType_t and ncclRedOp_t


class NcclError(RuntimeError):
    """What NCCL says of a call that failed."""


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * _ID_BYTES)]


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
            "ncclCommInitRank": [ctypes.POINTER(pointer), integer, _UniqueId, integer],
            "ncclBroadcast": [pointer, pointer, size, integer, integer, pointer, pointer],
            "ncclAllReduce": [pointer, pointer, size, integer, integer, pointer, pointer],
            "ncclCommAbort": [pointer],
        }.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, integer
        self._library.ncclGetErrorString.argtypes = [integer]
        self._library.ncclGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: object) -> None:
        """``arguments`` as in the C function; raises what it returns unless that is success."""
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            told = self._library.ncclGetErrorString(status).decode(errors="replace")
            raise NcclError(f"{name}: {told}")

    def unique_id(self) -> bytes:
        """128 bytes by which ranks of a new communicator find one another."""
        made = _UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made)


class Communicator:
    """Rank 0 of ``size``, on the current CUDA device.

    ``join`` and ``broadcast`` give work for a thread, which waits for the other ranks; ``abort``, from
    another thread, ends that wait.
    """

    def __init__(self, library: NcclLibrary, unique_id: bytes, size: int) -> None:
        self._library = library
        self._id = _UniqueId.from_buffer_copy(unique_id)
        self._size = size
        self._device = torch.cuda.current_device()
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._handle = ctypes.c_void_p()
        self._lock = threading.Lock()
        self._aborted = False

    def join(self) -> Callable[[], None]:
        """Meet the others, and sum one number with them: the first call of vLLM's workers."""

        def work() -> None:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                handle = ctypes.c_void_p()
                self._library.call("ncclCommInitRank", ctypes.byref(handle), self._size, self._id, 0)
                with self._lock:
                    self._handle = handle
                    if self._aborted:  # too late: nobody else would end it
                        self._library.call("ncclCommAbort", handle)
                        raise NcclError("ncclCommInitRank: the others came after this process had left")
                one = torch.zeros(1, device=self._device)
                place = one.data_ptr()
                self._library.call("ncclAllReduce", place, place, 1, _FLOAT32, _SUM, handle, self._queue)
                self._stream.synchronize()

        return work

    def broadcast(self, packed: Tensor) -> Callable[[], None]:
        """Send uint8 [bytes], which the current stream makes."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        packed.record_stream(self._stream)  # where the wait is given up, its memory is still being read

        def work() -> None:
            with torch.cuda.device(self._device):
                place = packed.data_ptr()
                self._library.call(
                    "ncclBroadcast", place, place, packed.numel(), _UINT8, 0, self._handle, self._queue
                )
                self._stream.synchronize()

        return work

    def abort(self) -> None:
        """Let go of it, whatever it does."""
        with self._lock:
            if not self._aborted and self._handle.value is not None:
                try:
                    self._library.call("ncclCommAbort", self._handle)
                except NcclError as error:  # beside what it is aborted for
                    logger.warning("a communicator with vLLM's workers does not end: %s", error)
            self._aborted = True

    @property
    def _queue(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._stream.cuda_stream)
