"""Optional accelerators, probed once without importing them.

An installed package of the right name proves little: the bare ``transformer-engine`` meta package
raises on import, and ``apex`` on PyPI is an unrelated project. The probes look for the compiled part
that Megatron-core uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class Probe:
    """What was found of an optional package and what is lost without it."""

    usable: bool
    found: str
    lost: str


def _distribution(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _any_of(names: tuple[str, ...], lost: str) -> Probe:
    """The first of ``names`` that is installed."""
    for name in names:
        found = _distribution(name)
        if found is not None:
            return Probe(True, f"{name} {found}", "")
    return Probe(False, "not installed", lost)


@cache
def transformer_engine() -> Probe:
    """Transformer Engine: its PyTorch part is the compiled module ``transformer_engine_torch``.

    From PyPI that is a distribution of its own, ``transformer-engine-torch``. NVIDIA's images and builds from
    source have the module without it.
    """
    lost = "fused attention, norms and FP8; Megatron's local layers are used"
    meta, torch_part = _distribution("transformer-engine"), _distribution("transformer-engine-torch")
    if torch_part is not None:
        return Probe(True, f"transformer-engine-torch {torch_part}", "")
    if find_spec("transformer_engine") is not None and find_spec("transformer_engine_torch") is not None:
        return Probe(True, f"transformer-engine {meta or 'of unknown version'} with its PyTorch part", "")
    if meta is not None:
        return Probe(False, f"transformer-engine {meta} without its PyTorch part", lost)
    return Probe(False, "not installed", lost)


def transformer_engine_layers() -> bool:
    """Whether models use Transformer Engine's layers: it is usable, and there is a GPU."""
    return transformer_engine().usable and torch.cuda.is_available()


@cache
def apex() -> Probe:
    """NVIDIA Apex: the extension ``amp_C`` is what tells it from the unrelated PyPI package."""
    lost = "fused Adam and multi-tensor norms; torch's are used"
    if find_spec("amp_C") is not None:
        return Probe(True, "NVIDIA apex (amp_C)", "")
    if find_spec("apex") is not None:
        return Probe(False, "a package named apex that is not NVIDIA's (no amp_C)", lost)
    return Probe(False, "not installed", lost)


@cache
def wandb() -> Probe:
    """Weights & Biases, the ``wandb`` extra."""
    return _any_of(("wandb",), "logging to Weights & Biases; TensorBoard and metrics.jsonl remain")


@cache
def tensorboard() -> Probe:
    """TensorBoard, which is installed with the package."""
    return _any_of(("tensorboard",), "its event files; metrics.jsonl remains")


@cache
def mlflow() -> Probe:
    """MLflow, the ``mlflow`` extra; ``mlflow-skinny`` will do."""
    return _any_of(("mlflow", "mlflow-skinny"), "logging to MLflow; TensorBoard and metrics.jsonl remain")


@cache
def trackio() -> Probe:
    """Trackio, the ``trackio`` extra."""
    return _any_of(("trackio",), "logging to Trackio; TensorBoard and metrics.jsonl remain")


@cache
def pandas() -> Probe:
    """pandas, the ``pandas`` extra, which datasets brings along."""
    return _any_of(("pandas",), "gapo_mega.read_run; metrics.jsonl is one JSON object a line")


@cache
def einops() -> Probe:
    """einops, the ``instances`` extra, by which Megatron arranges the ranks of optimizer instances."""
    return _any_of(("einops",), "parallel.distributed_optimizer_instances above 1")


@cache
def serve() -> Probe:
    """FastAPI and uvicorn, the ``serve`` extra."""
    found = {name: _distribution(name) for name in ("fastapi", "uvicorn")}
    missing = [name for name, installed in found.items() if installed is None]
    if not missing:
        return Probe(True, ", ".join(f"{name} {installed}" for name, installed in found.items()), "")
    lost = "the command serve-reward; objectives of kind http still use any service of that protocol"
    return Probe(False, f"{' and '.join(missing)} not installed", lost)
