"""The Report: one model, rendered by the modules beside it. Its JSON Schema is `schema.json`, checked in the tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

SCHEMA_VERSION: Final = 1

_NullUnlessFinite = PlainSerializer(
    lambda value: value if value is not None and math.isfinite(value) else None, return_type=float | None
)
Measured = Annotated[float | None, _NullUnlessFinite]
"""A measured number; None where the recipe does not ask for it. JSON has no NaN or infinity: they become null too."""


class Part(BaseModel):
    """Base of every part: strict about its keys, so that a renderer and a reader can rely on them."""

    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class OutputNumerics(Part):
    """How far one output is from the reference, over all verification samples."""

    output: str
    max_abs: Measured = Field(default=None, description="Largest absolute difference.")
    relative_l2: Measured = Field(
        default=None, description="L2 norm of the difference over the L2 norm of the reference."
    )
    cosine: Measured = Field(default=None, description="Mean cosine similarity of rows along the last axis.")
    sqnr_db: Measured = Field(
        default=None, description="Signal over difference in decibels; null where they are equal."
    )
    top1: Measured = Field(default=None, description="Part of rows whose largest entry is the same.")
    top5: Measured = Field(default=None, description="Part of each row's five largest entries that is the same.")
    kl: Measured = Field(default=None, description="Mean Kullback-Leibler divergence of rows as logits, in nats.")
    custom: dict[str, Measured] = Field(default_factory=dict, description="Metric of the recipe's own → mean.")
    finite: bool = Field(description="False where this output has NaN or infinity that the reference has not.")

    @model_validator(mode="after")
    def _null_is_nan_where_not_finite(self) -> Self:
        if not self.finite:
            for metric in ("max_abs", "relative_l2", "cosine"):
                if getattr(self, metric) is None:
                    setattr(self, metric, math.nan)
        return self


class RegionReport(Part):
    """A region that a step changed: nodes that it put there, and how far what they make is from what was made before.

    Both on captured values of real inputs, so that an error is this step's own.
    """

    nodes: list[str] = Field(description="The new nodes, the first ones of many.")
    replaced: list[str] = Field(default_factory=list, description="The nodes that stood there, the first ones of many.")
    module: str = ""
    outputs: list[OutputNumerics] = Field(description="Tensors that the region hands on.")

    @property
    def relative_l2(self) -> float:
        """Of the output that moved furthest; infinite where one is not finite."""
        errors = (o.relative_l2 if o.finite and o.relative_l2 is not None else math.inf for o in self.outputs)
        return max(errors, default=0.0)


class RewriteLine(Part):
    number: int
    rule: str
    node: str
    module: str = ""
    detail: str = ""


class NearMissLine(Part):
    rule: str
    node: str
    module: str = ""
    reason: str


class TradeOffLine(Part):
    """One assignment of precisions that a search has measured."""

    layers: int = Field(description="In the narrowest precision.")
    left: list[str] = Field(description="Nodes that could have been, and are not.")
    cosine: Measured = Field(description="Of the graph's outputs, against those before the pass.")
    relative_l2: Measured
    cosine_bound: Measured = Field(description="What its mean over all data like the samples keeps to, at 95 %.")
    relative_l2_bound: Measured
    weight_bytes: int
    time: float = Field(description="Of the products, estimated; 1 is all of them in float32.")
    chosen: bool


class ActivationLine(Part):
    """An activation that a pass has quantized, on the calibration data."""

    tensor: str
    scale: float
    clip: float = Field(description="Magnitude that is clipped at.")
    amax: float = Field(description="Largest magnitude.")
    saturated: Measured = Field(
        default=None, description="Share of its values larger than `clip`; null where no data was run for the scale."
    )
    values: int = Field(default=0, description="All that were seen, zeros too.")
    zeros: int = 0
    bin_width: float = Field(default=0.0, description="Of `counts`, the first of which begins at 0.")
    counts: list[int] = Field(default_factory=list, description="Magnitudes above 0, bin by bin.")


class PassReport(Part):
    """One step of the recipe. Step 0 is the load: its numerics compare the loaded graph with the source model."""

    index: int
    key: str
    status: Literal["done", "skipped", "rolled back", "over budget", "crashed"] = "done"
    reason: str = Field(default="", description="Why a pass was skipped or crashed, or which budget it broke, and how.")
    parameters: dict[str, object] = Field(default_factory=dict)
    nodes_before: dict[str, int] = Field(default_factory=dict, description="Operator → count.")
    nodes_after: dict[str, int] = Field(default_factory=dict)
    weight_bytes_after: int = 0
    rewrites: list[RewriteLine] = Field(default_factory=list)
    near_misses: list[NearMissLine] = Field(default_factory=list)
    kept: dict[str, str] = Field(default_factory=dict, description="Node → why its precision was left alone.")
    verified: Literal["", "local", "full"] = Field(
        default="", description="'full': the whole graph, against the reference; 'local': the regions that changed."
    )
    numerics: list[OutputNumerics] = Field(
        default_factory=list, description="Of the whole graph; empty where only regions were compared."
    )
    regions_compared: int = 0
    regions: list[RegionReport] = Field(default_factory=list, description="Regions that moved, the furthest first.")
    left_out: list[RewriteLine] = Field(
        default_factory=list, description="Rewrites that broke a budget and were left out."
    )
    frontier: list[TradeOffLine] = Field(
        default_factory=list, description="What a search over precisions has measured, the cheapest first."
    )
    activations: list[ActivationLine] = Field(
        default_factory=list, description="Those that were quantized with scales from calibration data."
    )
    clipped_weights: dict[str, float] = Field(
        default_factory=dict, description="Weight → share of its values beyond the last level by half a step or more."
    )
    weight_scales: dict[int, int] = Field(
        default_factory=dict, description="Exponent e → how many scales of weights are in [2^e, 2^(e + 1))."
    )
    warnings: list[str] = Field(default_factory=list)


class TensorLine(Part):
    name: str
    dtype: str
    shape: list[int | str | None] | None = Field(description="Null where the rank is unknown.")


class DtypeWeights(Part):
    parameters: int
    bytes: int


class GraphReport(Part):
    """The graph that the target was given."""

    opset: int
    nodes: dict[str, int] = Field(description="Operator → count, most frequent first.")
    inputs: list[TensorLine]
    outputs: list[TensorLine]
    weights: dict[str, DtypeWeights] = Field(description="dtype → parameters and bytes.")
    flops: int | None = Field(description="Of one run at `sizes`; multiply and add count as two; null where unknown.")
    flops_uncounted: int = Field(
        default=0, description="Products left out of `flops`: shapes unknown, or in a branch or loop."
    )
    sizes: dict[str, int] = Field(default_factory=dict, description="Symbolic dimension → size that `flops` is for.")


class LayerPrecision(Part):
    """One layer with arithmetic: the dtype that the recipe asked for, and those found in the graph and the engine."""

    node: str
    op: str
    module: str = ""
    asked: str
    found: str
    engine: str = Field(default="", description="In which the engine computes its product; '' where nothing tells.")
    reason: str = Field(default="", description="Why they differ, where a pass said so.")


class TaskReport(Part):
    """How well the model does what it is for."""

    metric: str
    data: str = Field(description="Name of the file of labelled data.")
    samples: int
    source: Measured = Field(description="Of the source model.")
    compiled: Measured = Field(description="Of the graph that the target was given.")
    drop: Measured = Field(description="How much was lost: in the metric's unit, of perplexity the relative rise.")
    max_drop: float | None = None


class Verification(Part):
    reference: str = Field(description="What outputs are compared with: 'torch', or 'the loaded graph'.")
    inputs: str = Field(description="Where the samples came from.")
    samples: int
    budgets: dict[str, float] = Field(default_factory=dict)
    task: TaskReport | None = None


class TargetReport(Part):
    kind: str
    files: dict[str, int] = Field(default_factory=dict, description="File, by its path in the artifact → bytes.")
    facts: dict[str, object] = Field(
        default_factory=dict, description="What is honestly known, as the target names it."
    )
    profiles: list[dict[str, tuple[int, int, int]]] = Field(
        default_factory=list, description="Symbolic dimension → least, optimal and largest size."
    )
    layers: list[dict[str, object]] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


class SourceReport(Part):
    kind: str
    name: str
    sha256: str
    task: str | None = None
    half: Literal["encoder", "decoder"] | None = Field(
        default=None, description="Which graph of an encoder-decoder; null for a model of one graph."
    )
    exporter: str = ""
    notes: list[str] = Field(default_factory=list)

    @property
    def title(self) -> str:
        """The name, and which graph of the model it is."""
        return f"{self.name}, {self.half}" if self.half else self.name


class Timings(Part):
    """Seconds, and memory. The one part of a report that differs between two runs of the same compile."""

    total: float
    steps: dict[str, float] = Field(description="Step ('load', '1 fold-constants', 'verify', 'build') → seconds.")
    verification: dict[str, float] = Field(
        default_factory=dict, description="Step → seconds of steps['verify'] that went to verifying it."
    )
    cached: list[str] = Field(default_factory=list, description="Steps that were not run, but found in the cache.")
    memory: dict[str, int] = Field(
        default_factory=dict,
        description="Process ('llmc', 'builder') → the most bytes it had in memory, pages of mapped files included.",
    )


class Report(Part):
    """What a compile did, and how well."""

    schema_version: Literal[1] = SCHEMA_VERSION
    llmc: str = Field(description="Version of llmc.")
    status: Literal["done", "rolled back", "over budget", "crashed", "fell back"] = Field(
        description="'rolled back': done, without rewrites that broke a budget."
    )
    source: SourceReport
    recipe: str = Field(description="Name of the recipe.")
    passes: list[PassReport]
    graph: GraphReport
    precision: list[LayerPrecision] = Field(default_factory=list)
    verification: Verification | None = None
    target: TargetReport | None = None
    warnings: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(description="Everything that had a say: package → version.")
    timings: Timings
    encoder: Report | None = Field(
        default=None, description="Of an encoder-decoder's encoder, where the rest is of its decoder."
    )

    def graphs(self) -> list[Report]:
        """The report of each graph, in the order in which they run."""
        return [self.encoder, self] if self.encoder is not None else [self]


class ModelReport(Part):
    """What an ONNX model holds, without compiling it."""

    file: str
    graph: GraphReport
    precision: list[LayerPrecision]


class EngineReport(Part):
    """What the header of an engine says."""

    file: str
    bytes: int
    header: dict[str, object]


def write(report: Report, folder: Path) -> list[Path]:
    """Write report.json, report.md and report.html to `folder`; returns their paths."""
    from llmc.compiler.report import html, json, markdown

    pages = {"report.json": json.render, "report.md": markdown.render, "report.html": html.render}
    written = []
    for name, render in pages.items():
        path = folder / name
        path.write_text(render(report), encoding="utf-8", newline="\n")
        written.append(path)
    return written
