"""Where a pass that needs activations gets them: a section of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DATA = (
    "Folder of .npz files or images; text, one sample a line; or a Python function that yields dicts of arrays, "
    "'file.py:function' or 'module:function'"
)


class Calibration(BaseModel):
    """Which samples the activations come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: Path | None = Field(None, description=f"{DATA}.")
    samples: int = Field(128, gt=0, description="Samples to use, from the first; all where there are fewer.")


class Clipping(Calibration):
    """Where the scales of activations come from."""

    method: Literal["minmax", "percentile", "entropy", "mse", "search"] = Field(
        "mse",
        description="How to choose where activations clip; 'search' tries percentiles and 'mse' for each, and takes "
        "what its products lose least by.",
    )
    statistics: Path | None = Field(
        None,
        description="calibration.json of an earlier compile: scales are taken from it, and no data is run for them.",
    )
    percentile: float = Field(99.99, gt=0, le=100, description="Percent of values left unclipped by 'percentile'.")

    @field_validator("method", mode="before")
    @classmethod
    def _no_moving_average(cls, method: object) -> object:
        if method in ("moving-average", "moving_average"):
            raise ValueError("a moving average depends on the order of the samples and on their batches: use 'minmax'")
        return method

    @model_validator(mode="after")
    def _search_runs_data(self) -> Self:
        if self.method == "search" and self.statistics is not None:
            raise ValueError(
                "method 'search' runs data: leave statistics out, or give the method that they were made by"
            )
        return self

    @property
    def scales_alone(self) -> bool:
        """Whether scales are known from earlier, and there is no data to learn anything else from."""
        return self.statistics is not None and self.data is None


class Judging(BaseModel):
    """Which samples a result is judged on; none of them calibrates."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: Path | None = Field(
        None,
        description=f"{DATA}; null: what follows the calibration samples in their data, which both share in proportion "
        "where it has too few.",
    )
    samples: int = Field(128, gt=0, description="Samples to judge on, from the first; all where there are fewer.")
