"""Writing model directories: whole or not at all, one tensor in memory at a time."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gapo_mega.models.casting import dtype_name
from gapo_mega.models.huggingface.directory import INDEX, SINGLE, companions_in
from gapo_mega.models.huggingface.safetensors_stream import num_bytes, write_safetensors
from gapo_mega.scratch import MADE_BY, Maker, facts_of, left, scratch, size_of, tell_removed

logger = logging.getLogger(__name__)


def write_hf(
    directory: str | Path,
    companions: str | Path,
    promised: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, object] | None = None,
    overwrite: bool = False,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write a model directory; it appears under its name only once it is complete.

    Args:
        directory: what to create.
        companions: directory whose configuration, tokenizer and chat template are copied byte for byte;
            ``dtype`` in ``config.json`` follows the tensors where it says otherwise.
        promised: name, shape and type of every tensor in the order in which they come (meta tensors do).
        tensors: the tensors, consumed one at a time.
        config: entries of ``config.json`` that differ from the companions'.
        overwrite: replace ``directory`` where it exists already.
        shard_bytes: size at which a new safetensors file is begun.

    Raises:
        ValueError: ``directory`` exists and ``overwrite`` is false, or it cannot be written.
    """
    needed = sum(map(num_bytes, promised.values()))
    with complete_or_absent(Path(directory), overwrite, needed) as partial:
        copy_companions(Path(companions), partial)
        _write_shards(partial, promised, iter(tensors), shard_bytes)
        set_config(partial / "config.json", config or {}, common_dtype(promised.values()))


def copy_companions(source: Path, target: Path) -> None:
    """Copy everything of a model directory but its weights; make ``target`` if need be."""
    target.mkdir(parents=True, exist_ok=True)
    for file in companions_in(source):
        (target / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / file, target / file)


def write_template(directory: Path, text: str | None) -> None:
    """Give a model directory another chat template; None leaves it its own."""
    if text is not None:
        (directory / "chat_template.jinja").write_text(text, encoding="utf-8")


def refuse_inside(source: Path, target: Path, parameter: str = "--to") -> None:
    """Raise ``ValueError`` where writing ``target`` would replace ``source``, which is read meanwhile."""
    if source.exists() and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(
            f"{parameter}: found {target}, which holds {source}, accepted: a directory beside it"
        )


@contextmanager
def complete_or_absent(target: Path, overwrite: bool, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling of ``target`` that takes its name when the block ends without an error.

    First removes what a killed process left in writing ``target``. Raises ``ValueError`` when ``target``
    exists without ``overwrite``, when its parent cannot be written to or has less than ``needed_bytes`` free,
    and for errors of the disk inside the block.
    """
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; name a directory that does not, or ask to overwrite it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        finish_interrupted(target)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error}") from error
    if free < needed_bytes:
        raise ValueError(
            f"{target}: {needed_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free there"
        )
    try:
        with scratch(target.parent, f".{target.name}.partial-") as (partial, maker):
            partial.chmod(0o755)  # what it becomes is not private
            yield partial
            _put_in_place(partial, target, maker)
    except OSError as error:
        raise ValueError(f"{target} was not written: {error}") from error


def finish_interrupted(target: Path) -> None:
    """Tidy up after processes that were killed while they wrote ``target``. Raises ``OSError``.

    What ``target`` was before comes back where nothing else has its name.
    """
    for partial in left(target.parent, f".{target.name}.partial-"):
        replaced = _replaced(target, (facts_of(partial) or {}).get("replaced"))
        if replaced is not None and not target.exists():
            replaced.rename(target)
            logger.warning("%s is what it was before a killed process began to replace it", target)
        size = size_of(partial)
        shutil.rmtree(partial)
        tell_removed(partial, size)
    facts = facts_of(target)
    if facts is not None:  # it is complete, and what it replaced may still be there
        replaced = _replaced(target, facts.get("replaced"))
        if replaced is not None:
            size = size_of(replaced)
            _remove(replaced)
            tell_removed(replaced, size)
        (target / MADE_BY).unlink()


def _replaced(target: Path, name: object) -> Path | None:
    """The directory of that name, if it is there and ``target`` once was it."""
    if not isinstance(name, str) or not name.startswith(f".{target.name}.replaced-"):
        return None
    path = target.with_name(name)
    return path if path.exists() or path.is_symlink() else None


def _put_in_place(partial: Path, target: Path, maker: Maker) -> None:
    """Rename ``partial`` to ``target``; remove what had that name only once the new one is there."""
    if not target.exists():
        maker.leave(partial)
        partial.rename(target)
        return
    replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    maker.note(replaced=replaced.name)
    target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    try:
        _remove(replaced)
    except OSError as error:
        logger.warning(
            "%s was replaced; what it held could not be removed from %s: %s", target, replaced, error
        )
    maker.leave(target)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()  # what lies behind it may be somebody else's
    else:
        shutil.rmtree(path)


def _write_shards(
    directory: Path, promised: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> None:
    """Safetensors files, and their index when there are several."""
    shards = _partition(promised, shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(directory / file, shard, islice(tensors, len(shard)))
    assert next(tensors, None) is None, "more tensors than promised"
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(map(num_bytes, promised.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _partition(promised: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Consecutive tensors of at most ``shard_bytes`` together; a larger tensor is alone in its file."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in promised.items():
        size = num_bytes(tensor)
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += size
    return shards


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The type of all tensors but single numbers (a normaliser's statistics); None where types differ."""
    found = {tensor.dtype for tensor in tensors if tensor.numel() > 1}
    return found.pop() if len(found) == 1 else None


def set_config(file: Path, changes: Mapping[str, object], dtype: torch.dtype | None) -> None:
    """Set ``changes`` and, where the file names a type, that of the tensors; write only what changed."""
    config = json.loads(file.read_text())
    before = dict(config)
    config.update(changes)
    for key in ("dtype", "torch_dtype"):  # the second is the name before transformers 5
        if key in config and dtype is not None:
            config[key] = dtype_name(dtype)
    if config != before:
        file.write_text(json.dumps(config, indent=2) + "\n")
