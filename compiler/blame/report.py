"""What was found: one model, which the terminal and JSON renderings are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmc.compiler.report import Measured, OutputNumerics, Part


class Point(Part):
    """The graph after one number of rewrites, measured."""

    rewrites: int
    numerics: list[OutputNumerics]
    breaches: list[str] = Field(description="What is outside the budget; nothing where all of it holds.")

    @property
    def holds(self) -> bool:
        return not self.breaches


class Guilty(Part):
    """The first rewrite after which the budget is broken."""

    number: int = Field(description="In the whole compile, from 1; 0: the loaded graph itself.")
    pass_index: int
    key: str
    rule: str
    node: str
    module: str
    detail: str
    share: Measured = Field(description="Of the error after it, the part that was not there before it: 0 to 1.")
    only_pass: bool = Field(default=False, description="The pass breaks it before its first rewrite.")


class TensorError(Part):
    """One tensor that two graphs both have, by name, and how far apart its values are."""

    tensor: str
    node: str
    op: str
    module: str
    dtype: str
    relative_l2: Measured
    max_abs: Measured
    cosine: Measured
    finite: bool
    expected: tuple[Measured, Measured] = Field(description="Least and largest value in the first graph.")
    found: tuple[Measured, Measured] = Field(description="Least and largest finite value in the second graph.")


class Reproducer(Part):
    """The smallest part of the graph that still shows it."""

    folder: str
    nodes_before: int
    nodes_after: int
    nodes_of_graph: int
    inputs: list[str]
    output: str
    budget: dict[str, float]
    same_budget: bool = Field(description="Whether the part alone breaks the budget that the whole graph breaks.")
    command: str
    again: str = Field(description="The command that lets the pass do it anew, on the part.")


class Reproduction(Part):
    """What a reproducer does now."""

    about: Reproducer
    guilty: Guilty
    numerics: list[OutputNumerics]
    breaches: list[str]


class LayerError(Part):
    """One layer of a precision pass, converted alone."""

    number: int = Field(description="Of its first rewrite.")
    layer: str = Field(description="A node, or in large models a module.")
    op: str
    module: str
    nodes: list[str]
    numerics: list[OutputNumerics]


class Remaining(Part):
    """What is left of the error where the worst layers stay in their old precision."""

    kept: int
    numerics: list[OutputNumerics]
    holds: bool


class Sensitivity(Part):
    """The layers of one precision pass, the worst first."""

    key: str
    metric: str
    layers: list[LayerError]
    remaining: list[Remaining]
    enough: int | None = Field(description="Least number of layers to keep so that the budget holds; null: none does.")
    setting: dict[str, list[str]] = Field(description="Parameter of the pass that leaves those layers alone.")


class Blame(Part):
    """The answer to 'which layer did it?'."""

    status: Literal["holds", "broken", "broken as loaded"]
    source: str
    recipe: str
    budget: dict[str, float]
    rewrites: int = Field(description="Of the whole compile.")
    points: list[Point] = Field(description="Every graph that was measured, by number of rewrites.")
    monotone: bool = Field(description="Whether the measured errors only grow with the number of rewrites.")
    guilty: Guilty | None = None
    appears: TensorError | None = Field(default=None, description="The first tensor that the guilty rewrite changed.")
    not_finite: TensorError | None = Field(default=None, description="The first one that became NaN or infinite.")
    growth: list[TensorError] = Field(
        default_factory=list, description="Graph before against after the rewrite, graph order."
    )
    total: list[TensorError] = Field(
        default_factory=list, description="Loaded graph against the final one, graph order."
    )
    sample: int | None = Field(default=None, description="The worst verification sample, from 0; growth is of it.")
    reproducer: Reproducer | None = None
    sensitivity: list[Sensitivity] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
