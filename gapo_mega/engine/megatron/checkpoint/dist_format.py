"""Writes and reads Megatron's ``torch_dist`` checkpoint format one tensor at a time, without a model.

torch.distributed.checkpoint asks a *planner* for each piece of data when it writes or reads it. The planners
here make the data at that moment, so that neither side ever holds a whole model.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save as write_files

from gapo_mega.engine.megatron.checkpoint.failures import Files, interrupts

BACKEND = "torch_dist"
FORMAT = 1  # version of the data that this package writes besides the tensors
# Makes tensor names independent of the number of optimizers, as in Megatron's own reshardable format.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a directory in Megatron's ``torch_dist`` format."""
    config = maybe_load_config(str(path)) if path.is_dir() else None
    return config is not None and config.sharded_backend == BACKEND


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor in the checkpoint, and how to make it when the writer reaches it."""

    key: str
    whole: tuple[int, ...]  # shape of the whole tensor
    offset: tuple[int, ...]
    like: Tensor  # on the meta device: shape and dtype of this part
    make: Callable[[], Tensor]

    def item(self) -> WriteItem:
        """The description that torch's writer needs in advance."""
        offsets, sizes = torch.Size(self.offset), torch.Size(self.like.shape)
        return WriteItem(
            index=MetadataIndex(self.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                properties=TensorProperties(dtype=self.like.dtype),
                size=torch.Size(self.whole),
            ),
        )


def write(
    directory: Path, chunks: Iterable[Chunk], empty_objects: Iterable[str], common: dict[str, Any]
) -> None:
    """Write a checkpoint into ``directory``. Collective if torch.distributed is initialized.

    Args:
        directory: exists, and is on a file system that all ranks share.
        chunks: the chunks that this rank writes.
        empty_objects: keys of the empty objects that this rank writes and Megatron's layers load.
        common: picklable, the same on all ranks; ``read_common`` returns it.
    """
    distributed = dist.is_initialized()
    write_files(
        {},
        storage_writer=Files(directory, thread_count=1, sync_files=True),
        planner=_LazySave(chunks, empty_objects),
        no_dist=not distributed,
    )
    if not distributed or dist.get_rank() == 0:
        with interrupts():
            torch.save(common, directory / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig(BACKEND), str(directory))  # last: marks the checkpoint as complete
    if distributed:
        dist.barrier()


def read_common(directory: Path) -> dict[str, Any]:
    """Unpickle what ``write`` (or a run) stored besides the tensors.

    Raises ``ValueError`` if it is missing or broken.
    """
    try:
        common: dict[str, Any] = torch.load(directory / COMMON_STATE_FNAME, weights_only=False)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"checkpoint {directory}: its {COMMON_STATE_FNAME} cannot be read ({error}); accepted: the "
            "directory of a complete checkpoint"
        ) from error
    return common


def trained_model_prefix(about: dict[str, Any]) -> str:
    """Prefix of the model's keys: none in a converted checkpoint, the model's name in a run's checkpoint."""
    models = about.get("models", {})
    return next((f"{name}." for name in ("policy", "model") if name in models), "")


class _LazySave(DefaultSavePlanner):
    """Plans chunks without their data, and makes each chunk's data when the writer reaches it."""

    def __init__(self, chunks: Iterable[Chunk], empty_objects: Iterable[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {(chunk.key, chunk.offset): chunk for chunk in chunks}
        self._empty = list(empty_objects)

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._empty]
        self.plan = SavePlan([*(chunk.item() for chunk in self._chunks.values()), *objects])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([None], stream)  # Megatron stores a list of the objects under a key
            return stream
        assert index.offset is not None
        chunk = self._chunks[index.fqn, tuple(index.offset)]
        tensor = chunk.make()
        assert tensor.shape == chunk.like.shape and tensor.dtype == chunk.like.dtype, chunk.key
        return tensor.contiguous()


class DistReader:
    """Reads any part of any tensor of a checkpoint. Unpickles the checkpoint's index.

    Raises ``ValueError`` if ``directory`` holds no complete checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        if not is_checkpoint(directory):
            raise ValueError(
                f"checkpoint {directory}: no metadata.json of Megatron's torch_dist format there; accepted: "
                "the directory of a complete checkpoint"
            )
        self.path = directory
        self._reader = FileSystemReader(directory)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except (OSError, EOFError, UnpicklingError) as error:
            raise ValueError(f"checkpoint {directory} cannot be read: {error}") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of every tensor, by key."""
        entries = self._metadata.state_dict_metadata.items()
        return {key: value for key, value in entries if isinstance(value, TensorStorageMetadata)}

    @property
    def objects(self) -> frozenset[str]:
        """Keys of everything that is not a tensor."""
        entries = self._metadata.state_dict_metadata.items()
        return frozenset(key for key, value in entries if isinstance(value, BytesStorageMetadata))

    def read(self, key: str, place: Sequence[int] = ()) -> Tensor:
        """Read tensor ``key``, or its entry ``place`` along the first dimensions, which it drops."""
        stored = self.tensors[key]
        rest = len(stored.size) - len(place)
        offset = [*place, *[0] * rest]
        size = [*[1] * len(place), *stored.size[len(place) :]]
        target = torch.empty(size, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(size))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target.view(size[len(place) :])


class _Into(LoadPlanner):
    """Reads into one given tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is given")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.type == LoadItemType.TENSOR
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...
