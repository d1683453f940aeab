"""Hugging Face models: what Megatron needs to know about them, and their weights in and out.

Every file of ``families/`` that defines a ``Family`` is a model family; see docs/extending.md. Nothing
here imports Megatron.
"""

from gapo_mega.models.family import Family
from gapo_mega.models.huggingface.directory import HFDirectory
from gapo_mega.models.huggingface.writing import write_hf
from gapo_mega.models.mapping import WeightMap
from gapo_mega.models.registry import families, family_of, shape_of
from gapo_mega.models.shape import ModelShape

__all__ = [
    "Family",
    "HFDirectory",
    "ModelShape",
    "WeightMap",
    "families",
    "family_of",
    "shape_of",
    "write_hf",
]
