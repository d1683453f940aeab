"""One entry of ``objectives``, and how an entry with several outputs becomes several objectives."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from gapo_mega.config.fields import MOST_ROWS, Code, Name, Section


class ObjectiveConfig(Section):
    """One reward. Higher is better; flip the sign of costs in the function."""

    name: Name = Field(description="what the log calls it")
    kind: Code = Field("python", description="an entry of gapo_mega.objectives, or a class of one's own")
    function: Code | None = Field(
        None, description="module:function or path/to/file.py:function over (prompts, responses) -> scores"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the kind")
    columns: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="columns of the data beside the prompt that it reads, such as answer",
    )
    per_sample: bool = Field(
        False, description="the function scores one response a call, (prompt, response) -> score"
    )
    outputs: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None,
        description="in place of name: names in the mapping that the function gives; each becomes an "
        "objective of that name, and the function runs once for all",
    )
    output: Name | None = Field(
        None, description="the one name of that mapping which this objective reads; none: it is no mapping"
    )
    clip: float | None = Field(None, gt=0, description="scores are clipped to [-clip, clip]")

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_outputs(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("outputs") is None:
            return data
        beside = next((key for key in ("name", "output") if data.get(key) is not None), None)
        if beside is not None:
            raise ValueError(
                f"{beside}: found {data[beside]!r} beside outputs, accepted: none (every output is an "
                "objective of its own name)"
            )
        return {**data, "name": "outputs"}  # until they are split

    @model_validator(mode="after")
    def _names_once(self) -> ObjectiveConfig:
        for key, names in (("columns", self.columns), ("outputs", self.outputs or [])):
            if len(set(names)) != len(names):
                raise ValueError(f"{key}: found {names}, accepted: every name once")
        return self

    def split(self) -> list[ObjectiveConfig]:
        """One objective for each of ``outputs``; itself without them."""
        if self.outputs is None:
            return [self]
        return [
            self.model_copy(update={"name": output, "output": output, "outputs": None})
            for output in self.outputs
        ]


def split_outputs(objectives: list[ObjectiveConfig]) -> list[ObjectiveConfig]:
    """Objectives with ``outputs`` become one each, after validation so that errors have the file's places."""
    found = [one for objective in objectives for one in objective.split()]
    if len(found) > MOST_ROWS:
        raise ValueError(f"objectives: found {len(found)} with their outputs, accepted: {MOST_ROWS}")
    return found


Objectives = Annotated[
    list[ObjectiveConfig], Field(min_length=1, max_length=MOST_ROWS), AfterValidator(split_outputs)
]
