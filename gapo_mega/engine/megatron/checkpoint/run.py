"""Checkpoints of everything that training changes, in Megatron's ``torch_dist`` format.

Any layout loads models and optimizer states. Random-number states belong to ranks, so only the layout that
saved them restores them; there, on the CPU, a resumed run is bit for bit the uninterrupted one.
Hyper-parameters (learning rate, betas, length of the schedule) come from the resuming run: of a schedule,
loading restores only the position.

The calling process writes the files itself. Megatron's own writer starts a manager process by ``spawn``,
which imports the user's script once more, and forks one process per file, which is unsafe once CUDA or gloo
threads run.

Loading unpickles: load only checkpoints that you trust.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as write_files

from gapo_mega.engine.base import Layout
from gapo_mega.engine.megatron.checkpoint import model_state
from gapo_mega.engine.megatron.checkpoint.dist_format import FORMAT
from gapo_mega.engine.megatron.checkpoint.failures import Files, cause_in_words, interrupts
from gapo_mega.engine.megatron.checkpoint.optimizer_state import OptimizerState
from gapo_mega.engine.megatron.gradients.averages import AveragedRows
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.runtime import random_states, releases
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.engine.megatron.runtime.groups import Groups

_log = logging.getLogger(__name__)


def save(
    directory: Path,
    trainables: dict[str, Trainable],
    extra: dict[str, Any],
    groups: Groups,
    score_head: dict[str, Any] | None = None,
    averages: Mapping[str, AveragedRows] = MappingProxyType({}),
    lora: Mapping[str, object] | None = None,
    writer: FileSystemWriter | None = None,
) -> None:
    """Write models, optimizers, schedules, random-number states and ``extra``. Collective.

    Args:
        directory: on a file system that all ranks share; created if it does not exist.
        trainables: by a name that stays the same between saving and loading.
        extra: picklable; one per data rank is kept, from the first rank of each replica.
        score_head: fields of a score model's ``ScoreHead``, for a conversion.
        averages: running means of gradients, by the name of their trainable.
        lora: what ``models.adapters.settings_of`` says of the trained model's adapters; None: it has none.
        writer: of the tensors' files; None: torch's own, which has written them when this returns.

    Raises ``OSError`` that names the directory if writing it fails.
    """
    layout = groups.layout
    with _errors(directory, "written", OSError), megatron_device():
        if layout.is_main:
            directory.mkdir(parents=True, exist_ok=True)
        models: dict[str, dict[str, Any]] = {}
        state: dict[str, Any] = {"rng": _ranked("rng", random_states.current(), layout.rank, layout.world)}
        state["extra"] = _ranked("extra", extra, layout.data_rank, layout.data, replica=_replica_rank(layout))
        for name, trainable in trainables.items():
            trainable.gather_parameters()
            optimizer = _optimizer_state(name, trainable, groups, averages)
            models[name] = {
                **_kind(trainable, optimizer),
                "optimizer_step": optimizer.step,
                "averaged_updates": optimizer.averaged_updates,
                "schedule_step": trainable.scheduler.num_steps,
            }
            model = _by_chunk(trainable, model_state.to_save)
            state[name] = _prefixed(name, model, optimizer.to_save(model))
        about: dict[str, Any] = {"format": FORMAT, "layout": _sizes(layout), "models": models}
        about["score_head"] = score_head
        about["lora"] = None if lora is None else dict(lora)
        dist_checkpointing.save({"about": about, **state}, str(directory), _InProcessSave(writer))


def load(
    directory: Path,
    trainables: dict[str, Trainable],
    groups: Groups,
    averages: Mapping[str, AveragedRows] = MappingProxyType({}),
) -> dict[str, Any]:
    """Restore what ``save`` wrote, in any layout, and return ``extra``. Collective.

    With another number of data ranks every rank gets the ``extra`` of data rank 0. Raises ``ValueError`` that
    names the directory if it holds no checkpoint of these models.
    """
    layout = groups.layout
    with _errors(directory, "loaded", ValueError), releases.without_advice(), megatron_device():
        about = dist_checkpointing.load_common_state_dict(str(directory)).get("about", {})
        optimizers = {n: _optimizer_state(n, t, groups, averages) for n, t in trainables.items()}
        _check(directory, about, {n: _kind(t, optimizers[n]) for n, t in trainables.items()})
        saved = about["layout"]
        same_layout, same_data = saved == _sizes(layout), saved["data"] == layout.data
        state: dict[str, Any] = {
            "extra": _ranked("extra", None, layout.data_rank if same_data else 0, saved["data"])
        }
        if same_layout:
            state["rng"] = _ranked("rng", None, layout.rank, layout.world)
        for name, trainable in trainables.items():
            model = _by_chunk(trainable, lambda m: model_state.to_load(model_state.to_save(m)))
            state[name] = _prefixed(name, model, optimizers[name].to_load(model))
        # The integrity check would refuse parts that several ranks load, or none.
        loaded = dist_checkpointing.load(state, str(directory), validate_access_integrity=False)
    for name, trainable in trainables.items():
        _restore(trainable, optimizers[name], loaded[name], about["models"][name])
    if same_layout:
        random_states.restore(loaded["rng"])
    elif layout.is_main:
        _log.warning(
            "checkpoint %s was saved in another layout (%s, now %s): everything is restored but the "
            "states of the random-number generators, which belong to its ranks",
            directory, saved, _sizes(layout),
        )  # fmt: skip
    extra: dict[str, Any] = loaded["extra"]
    return extra


class _InProcessSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Writes Megatron's ``torch_dist`` format with torch's own writer, without other processes.

    Checkpoints of all releases of Megatron-core are alike: what is not sharded is in ``common.pt``.
    """

    def __init__(self, writer: FileSystemWriter | None) -> None:
        super().__init__("torch_dist", 1)
        self._writer = writer

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        common = releases.take_common(sharded_state_dict)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        write_files(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=self._writer or Files(checkpoint_dir, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        if common is not None and dist.get_rank() == 0:
            with interrupts():
                torch.save(common, Path(checkpoint_dir) / COMMON_STATE_FNAME)


def _optimizer_state(
    name: str, trainable: Trainable, groups: Groups, averages: Mapping[str, AveragedRows]
) -> OptimizerState:
    return OptimizerState(trainable.parameters(), trainable.optimizer, groups, averages.get(name))


def _by_chunk(trainable: Trainable, state_of: Callable[[GPTModel], dict[str, Any]]) -> dict[str, Any]:
    """By the number of the chunk, because chunks have the same names for their layers."""
    return {str(number): state_of(chunk) for number, chunk in enumerate(trainable.modules)}


def _prefixed(name: str, model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    state = {"model": model, "optimizer": optimizer}
    add_prefix_for_sharding(state, f"{name}.")
    return state


def _restore(
    trainable: Trainable, optimizer: OptimizerState, loaded: dict[str, Any], about: dict[str, Any]
) -> None:
    with megatron_device():
        for number, chunk in enumerate(trainable.modules):
            model_state.restore(chunk, loaded["model"][str(number)])
        optimizer.load(loaded.get("optimizer", {}))
        optimizer.step = about["optimizer_step"]
        optimizer.averaged_updates = about.get("averaged_updates", 0)
        trainable.scheduler.num_steps = 0
        trainable.scheduler.step(about["schedule_step"])


def _kind(trainable: Trainable, optimizer: OptimizerState) -> dict[str, Any]:
    """What must be equal in a checkpoint and in the model that loads it."""
    return {
        "dtype": str(trainable.dtype),
        "optimizer_tensors": sorted(optimizer.names),
    }


def _check(directory: Path, about: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
    if about.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {directory}: found format {about.get('format')}, "
            f"accepted: {FORMAT} (written by gapo_mega)"
        )
    if about["models"].keys() != expected.keys():
        raise ValueError(
            f"checkpoint {directory}: found the models {sorted(about['models'])}, "
            f"this run trains {sorted(expected)}"
        )
    for name, kind in expected.items():
        found = {key: about["models"][name][key] for key in kind}
        if found != kind:
            raise ValueError(
                f"checkpoint {directory}: found {found} for {name}, this run has {kind}; "
                "model.dtype, the kind of optimizer and aggregation.average cannot change"
            )


def _sizes(layout: Layout) -> dict[str, int]:
    sizes = {"world": layout.world, "tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data}
    return sizes if layout.context == 1 else {**sizes, "context": layout.context}


def _replica_rank(layout: Layout) -> int:
    stage = layout.pipeline_rank * layout.context + layout.context_rank
    return stage * layout.tensor + layout.tensor_rank


def _ranked(key: str, data: Any, index: int, count: int, replica: int = 0) -> ShardedObject:
    """Entry ``index`` of ``count`` as a sharded object; only its replica 0 is written."""
    return ShardedObject(key, data, (count,), (index,), replica_id=replica)


@contextmanager
def _errors(directory: Path, what: str, kind: type[Exception]) -> Iterator[None]:
    """Raise failures of the disk and of the format as one short message of type ``kind``."""
    try:
        yield
    except CheckpointException as error:
        raise kind(f"checkpoint {directory} cannot be {what} ({cause_in_words(error)})") from error
    except (OSError, CheckpointingException) as error:
        raise kind(f"checkpoint {directory} cannot be {what}: {error}") from error
