"""The file of ``gapo-mega sweep``: one run's configuration, and what varies between its points."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gapo_mega.config.fields import LocalPath, Section
from gapo_mega.config.results import WITHOUT_EFFECT

METHOD, PREFERENCE = "method", "preference"
# What a sweep itself sets in every point, and where its file says it.
_OWN = {"seed": "seeds", "output_dir": "output_dir"}


class WarmStart(Section):
    """A run that is trained once; its exported model is the ``model.path`` of every point."""

    command: Literal["sft", "train-pairs", "train"] = Field("sft", description="of gapo-mega")
    config: LocalPath = Field(description="its YAML file")
    settings: dict[str, Any] = Field(default_factory=dict, description="on top of it, by dotted name")


class FrontConfig(Section):
    """How the points are judged together."""

    objectives: list[str] | None = Field(
        None, min_length=1, description="those that span the front; none: all of the base"
    )
    reference_point: dict[str, float] | None = Field(
        None,
        description="where hypervolume begins, by objective; none: the held-out means before training. Once "
        "written in results.json it stays",
    )


class SweepConfig(Section):
    """Runs that differ in method, preference, seed or any other setting, and the front that they make."""

    base: LocalPath = Field(description="YAML file of a run of gapo-mega train")
    output_dir: LocalPath = Field(description="a folder for every point, and the results")
    seeds: list[int] | None = Field(None, min_length=1, description="of every point; none: the base's own")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="by setting the values that it takes, each with each. method takes names (or mappings "
        "with name and options), preference lists of one number per objective, any dotted name of the "
        "base its values",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="of all points, on top of the base, by dotted name"
    )
    nproc: int | None = Field(None, ge=1, description="local processes of every run; none: one")
    jobs: int | None = Field(
        None, ge=1, description="runs at once; none: as many as GPUs, or else cores, have room for"
    )
    warm_start: WarmStart | None = Field(None, description="none: points start from the base's model.path")
    front: FrontConfig = FrontConfig()

    @field_validator("grid")
    @classmethod
    def _values_differ(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in grid.items():
            if key in _OWN:
                raise ValueError(f"found the key {key}, accepted: {_OWN[key]} of the sweep")
            # Points that differ in nothing else could not be told apart.
            if key.startswith(WITHOUT_EFFECT):
                raise ValueError(
                    f"found the key {key}, which changes no number; accepted: settings of the sweep"
                )
            if not values:
                raise ValueError(f"found no value for {key}, accepted: one or more")
            texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
            if len(set(texts)) < len(texts):
                raise ValueError(f"found a value of {key} twice, accepted: each once")
        for value in grid.get(PREFERENCE, []):
            numbers = isinstance(value, list) and value and all(type(x) in (int, float) for x in value)
            if not numbers:
                raise ValueError(
                    f"found the preference {value!r}, accepted: a list of one number per objective"
                )
        return grid

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise ValueError(f"found {seeds}, accepted: each once")
        return seeds

    @model_validator(mode="after")
    def _settings_are_free(self) -> SweepConfig:
        for key in self.settings:
            if key in _OWN or key == PREFERENCE:
                accepted = "grid" if key == PREFERENCE else _OWN[key]
                raise ValueError(f"settings: found the key {key}, accepted: {accepted} of the sweep")
            if key in self.grid:
                raise ValueError(f"settings: found the key {key}, which grid has too; accepted: one of them")
        if self.warm_start is not None and "model.path" in {*self.settings, *self.grid}:
            raise ValueError("warm_start: found beside model.path, accepted: one of them")
        return self
