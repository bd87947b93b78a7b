"""The sections of a recipe, each a frozen model that is also its own documentation and JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from llmc.compiler.functions import IMPORT_PATH
from llmc.compiler.targets import Range, TargetKind

Metric = Literal["max_abs", "relative_l2", "cosine", "sqnr_db", "top1", "top5", "kl"]
METRICS: tuple[Metric, ...] = ("max_abs", "relative_l2", "cosine", "sqnr_db")
"""What is measured of every output."""
LOGITS_METRICS: tuple[Metric, ...] = ("top1", "top5", "kl")
"""What is measured besides of outputs called logits, and of every output where a recipe asks for it."""
AT_LEAST: frozenset[Metric] = frozenset({"cosine", "sqnr_db", "top1", "top5"})
"""Metrics whose budget is a least value; the budget of every other one is a largest value."""

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def _range(value: object) -> Range:
    """`8`, `[1, 8, 32]` or `{min: 1, opt: 8, max: 32}` → Range."""
    if isinstance(value, Range):
        return value
    if isinstance(value, Mapping) and set(value) == {"min", "opt", "max"}:
        sizes = [value["min"], value["opt"], value["max"]]
    else:
        sizes = value if isinstance(value, list) else [value] * 3
    if len(sizes) != 3 or not all(type(size) is int for size in sizes):
        raise ValueError("should be one size (8), [min, opt, max], or {min: 1, opt: 8, max: 32}")
    least, best, largest = sizes
    if not 0 <= least <= best <= largest:
        raise ValueError(f"sizes must rise: 0 ≤ min {least} ≤ opt {best} ≤ max {largest} does not hold")
    if largest == 0:
        raise ValueError("the largest size must be at least 1")
    return Range(least, best, largest)


def byte_count(text: str) -> int:
    """`'2GiB'` → 2147483648. Raises ValueError for what is no size."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2] not in _UNITS:
        raise ValueError(f"should be a number of bytes, or one with a unit ('512MiB', '2GiB'), got '{text}'")
    return int(float(found[1]) * _UNITS[found[2]])


def _bytes(value: object) -> object:
    """The number of bytes that a text stands for; anything else is left to the type check."""
    return byte_count(value) if isinstance(value, str) else value


def _sm(value: object) -> object:
    """`'sm80'` → 80; the major and minor number (8.0) is refused with the right form."""
    if isinstance(value, str) and re.fullmatch(r"(?i)sm_?[0-9]{2,3}", value):
        return int(value[2:].lstrip("_"))
    if isinstance(value, float):
        raise ValueError(f"should be written without the dot: {round(value * 10)}, not {value}")
    return value


_SIZE = {"type": "integer", "minimum": 0}
Sizes = Annotated[
    Range,
    PlainValidator(_range),
    PlainSerializer(asdict),
    WithJsonSchema(
        {
            "anyOf": [
                _SIZE,
                {"type": "array", "items": _SIZE, "minItems": 3, "maxItems": 3},
                {
                    "type": "object",
                    "properties": {"min": _SIZE, "opt": _SIZE, "max": _SIZE},
                    "required": ["min", "opt", "max"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
Bytes = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(_bytes),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["2GiB"]}]}),
]
ComputeCapability = Annotated[
    int,
    Field(ge=50, le=199),
    BeforeValidator(_sm),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "examples": [80, 86, 89, 120]},
                {"type": "string", "pattern": "^[sS][mM]_?[0-9]{2,3}$"},
            ]
        }
    ),
]
DimensionName = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: an unknown key is an error, and nothing is converted by guessing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """What is loaded, and the sizes of its dynamic dimensions."""

    task: str | None = Field(None, description="What the model is for ('feature-extraction'); null: inferred from it.")
    opset: int | None = Field(None, ge=17, le=24, description="ONNX opset to export at; null: the loader's choice.")
    cache: Literal["growing", "none"] = Field(
        "growing",
        description="Text generation: whether the graph takes and gives the keys and values of earlier tokens.",
    )
    half: Literal["encoder", "decoder"] | None = Field(
        None, description="Encoder-decoders: the one graph of the two that is wanted; null: both."
    )
    dimensions: dict[DimensionName, Sizes] = Field(
        {}, description="Symbolic dimension → its sizes: one size, [min, opt, max], or {min, opt, max}."
    )
    inputs: dict[str, tuple[Annotated[int, Field(ge=1)] | DimensionName, ...]] = Field(
        {}, description="Input of an ONNX model → its dimensions, by name or size, in place of those in the file."
    )
    processor: Path | None = Field(
        None,
        description="Folder with preprocessor_config.json, which says how images are prepared; null: the model's own.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")


class TargetSection(Section):
    """What is built."""

    kind: TargetKind = Field(
        "auto", description="'auto': tensorrt where there is a GPU, else tensorrt-rtx, else onnxruntime."
    )
    compute_capabilities: tuple[ComputeCapability, ...] = Field(
        (), description="GPU generations that the engine shall run on, as SM numbers; none: the target's default."
    )
    profiles: tuple[dict[DimensionName, Sizes], ...] = Field(
        (), description="Optimization profiles, each over model.dimensions; none: one profile of model.dimensions."
    )
    workspace: Bytes | None = Field(None, description="Scratch memory that the builder may plan with; null: no limit.")
    plugins: tuple[Literal["llmc"], ...] = Field(
        (), description="Plugins that run operators of llmc's own: full TensorRT alone takes them."
    )
    link_weights: bool = Field(
        False, description="Weights that no pass changed stay in the source's files, which the artifact links."
    )

    @model_validator(mode="after")
    def _no_duplicates(self) -> Self:
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ValueError("compute_capabilities names one twice")
        return self


class Budgets(Section):
    """How far outputs may be from the reference's; null: no limit."""

    cosine: float | None = Field(None, ge=-1, le=1, description="Least mean cosine similarity of rows.")
    max_abs: float | None = Field(None, ge=0, description="Largest absolute difference.")
    relative_l2: float | None = Field(None, ge=0, description="Largest L2 norm of the difference over the reference's.")
    sqnr_db: float | None = Field(None, description="Least signal over difference, in decibels.")
    top1: float | None = Field(None, ge=0, le=1, description="Least part of rows whose largest entry is the same.")
    top5: float | None = Field(None, ge=0, le=1, description="Least part of each row's five largest that is the same.")
    kl: float | None = Field(
        None, ge=0, description="Largest mean Kullback-Leibler divergence of rows taken as logits, in nats."
    )

    def limits(self) -> dict[str, float]:
        """The metrics that have a budget."""
        return {metric: limit for metric, limit in self if limit is not None}


class CustomMetric(Section):
    """A metric of the user's own: `function(expected, found) -> float` of one output of one sample, as arrays.

    Its mean over the samples is compared with the limits.
    """

    function: str = Field(
        pattern=IMPORT_PATH,
        description="'module:function', looked for beside the recipe and in the working directory too, or "
        "'file.py:function' beside the recipe.",
    )
    at_least: float | None = Field(None, description="Least value.")
    at_most: float | None = Field(None, description="Largest value.")


class TaskSection(Section):
    """How well the model does what it is for, on labelled data: before and after."""

    metric: Literal["accuracy", "f1", "spearman", "pearson", "perplexity"] = Field(
        description="accuracy, f1: of classes; spearman, pearson: of scores of sentence pairs; perplexity: of text."
    )
    data: Path = Field(
        description="JSONL, or TSV with a header: text, text_pair (for pairs), label. For perplexity text will do."
    )
    output: str | None = Field(None, description="The output that is judged; null: the first.")
    samples: int = Field(1000, ge=1, description="Largest number of lines that are used.")
    max_drop: float | None = Field(
        None,
        ge=0,
        description="Largest loss: in the metric's own unit, of perplexity the relative rise; null: no limit.",
    )


class VerifySection(Section):
    """How each step is compared with the loaded model."""

    inputs: Path | None = Field(
        None,
        description="Folder of .npz files or images; text, one sample a line; or a Python function that yields dicts "
        "of arrays, 'file.py:function' or 'module:function'; null: generated samples.",
    )
    samples: int = Field(10, ge=1, description="Largest number of samples that are run.")
    seed: int = Field(0, ge=0, description="Of generated samples.")
    ranges: dict[str, tuple[float, float]] = Field(
        {}, description="Input → least and largest value where it is generated; by default what the graph tells."
    )
    metrics: tuple[Metric, ...] = Field(
        METRICS, min_length=1, description="What is measured; of outputs called logits also top1, top5 and kl."
    )
    custom: dict[str, CustomMetric] = Field({}, description="Name → a metric of your own, of every output.")
    mode: Literal["local", "full", "final"] = Field(
        "local",
        description="'full': the whole graph after every pass; 'local': the regions that a pass changed, and the whole "
        "graph where they moved by more than rounding and at the end; 'final': the whole graph at the end.",
    )
    budgets: Budgets = Field(Budgets(), description="Must hold after every step that is compared.")
    half_budgets: Budgets = Field(
        Budgets(), description="Budgets that stand in for these where the model comes in float16 or bfloat16."
    )
    pass_budgets: dict[str, Budgets] = Field(
        {}, description="Pass → budgets that stand in for the general ones after this pass."
    )
    task: TaskSection | None = Field(None, description="A measure of the task itself, on labelled data.")
    on_failure: Literal["fail", "warn", "rollback"] = Field(
        "fail",
        description="What a broken budget does: 'fail' stops the compile; 'warn' goes on; 'rollback' leaves out the "
        "guilty rewrites, or the pass, and goes on.",
    )

    on_fallback: Literal["fail", "warn"] = Field(
        "fail", description="What a layer that is not in the precision asked for does, where no pass gave a reason."
    )

    @model_validator(mode="after")
    def _budgets_are_measured(self) -> Self:
        for budgets in (self.budgets, self.half_budgets, *self.pass_budgets.values()):
            unmeasured = set(budgets.limits()) - set(self.metrics) - set(LOGITS_METRICS)
            if unmeasured:
                raise ValueError(f"has a budget for {', '.join(sorted(unmeasured))}, which metrics leaves out")
        return self

    @property
    def asked(self) -> tuple[Metric, ...]:
        """The metrics that are measured of every output: those listed, and those of logits that have a budget."""
        limited = {metric for budgets in (self.budgets, *self.pass_budgets.values()) for metric in budgets.limits()}
        return (*self.metrics, *(m for m in LOGITS_METRICS if m in limited and m not in self.metrics))

    def limits(self, key: str | None = None) -> dict[str, float]:
        """Metric → limit after the pass `key`, or for the loaded graph (None)."""
        special = self.pass_budgets.get(key or "", Budgets())
        return self.budgets.limits() | special.limits()


class Document(Section):
    """A whole recipe; `passes` are checked by their own classes."""

    model: ModelSection = ModelSection()
    passes: tuple[Any, ...]
    target: TargetSection = TargetSection()
    verify: VerifySection = VerifySection()
