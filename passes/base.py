"""What a pass is, what it is given and what it gives back."""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal, Protocol

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict

from llmc.passes.errors import LlmcError as LlmcError
from llmc.passes.errors import PassError as PassError
from llmc.passes.errors import Skip as Skip
from llmc.passes.graph import (
    FOUR_BIT,
    Array,
    Graph,
    Node,
    Weights,
    infer_missing_shapes,
    infer_shapes,
    module_of,
    numpy_dtype,
    raw_values,
)

STORED_FROM = 1 << 20
"""Bytes from which a tensor that a pass has made need not stay in memory."""

Safety = Literal["exact", "tolerance", "lossy"]
Need = Literal["activations"]


@dataclass(frozen=True)
class Applied:
    """One rewrite that was done: its number in the run, the rule, and the node it was found at."""

    number: int
    rule: str
    node: str
    module: str = ""
    detail: str = ""


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule almost applied, and the first thing that stopped it."""

    rule: str
    node: str
    reason: str
    module: str = ""


@dataclass(frozen=True)
class TradeOff:
    """One assignment of precisions that a search has measured."""

    layers: int
    """In the narrowest precision."""
    left: tuple[str, ...]
    """Nodes that could have been, and are not."""
    cosine: float
    relative_l2: float
    """Of the graph's outputs, against those before the pass."""
    cosine_bound: float
    relative_l2_bound: float
    """What their means over all data like the samples keep to, with 95 % confidence."""
    weight_bytes: int
    time: float
    """Of the products, estimated; 1 is all of them in float32."""
    chosen: bool = False


@dataclass(frozen=True)
class Clipped:
    """Where the symmetric quantizer of one tensor should clip, by its values on calibration data."""

    method: str
    percentile: float
    """What 'percentile' was asked for; 100 with other methods."""
    samples: int
    amax: float
    """The largest magnitude."""
    clip: float
    """The magnitude to clip at; 0 where the tensor is 0 throughout."""


@dataclass(frozen=True)
class Spread:
    """How the magnitudes of one tensor's values lie on calibration data, and how many of them are clipped."""

    values: int
    """All of them, zeros too."""
    zeros: int
    saturated: float
    """Share of the values that are larger than the clipping point, to within one bin of the calibration's histogram."""
    width: float
    """Of a bin; the first one begins at 0, the last one holds the largest magnitude."""
    counts: tuple[int, ...]
    """Magnitudes above 0, bin by bin."""


@dataclass
class Scales:
    """The scales of what a pass has quantized."""

    activations: dict[str, float] = field(default_factory=dict)
    """Tensor → its scale."""
    weights: dict[int, int] = field(default_factory=dict)
    """Exponent e → how many scales of weights are in [2**e, 2**(e + 1))."""
    clipped: dict[str, float] = field(default_factory=dict)
    """Weight → share of its values that the level nearest to them would be beyond the last for."""

    def count(self, scales: Array) -> None:
        """Take in the scales of a weight, all above 0."""
        exponents = np.frexp(scales.astype(np.float64))[1] - 1
        for exponent, count in zip(*np.unique(exponents, return_counts=True), strict=True):
            self.weights[int(exponent)] = self.weights.get(int(exponent), 0) + int(count)


@dataclass
class PassResult:
    """What a pass did: rewrites, near misses, and for changes of precision what each node was asked to be."""

    rewrites: list[Applied] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    asked: dict[str, str] = field(default_factory=dict)
    """Node name → the dtype that this pass asks its arithmetic to have ('float16', 'int8'), or its weights alone
    ('int4 weights')."""
    kept: dict[str, str] = field(default_factory=dict)
    """Node name → why the pass left the node in its old precision."""
    warnings: list[str] = field(default_factory=list)
    frontier: list[TradeOff] = field(default_factory=list)
    """What a search over precisions has measured, the cheapest first."""
    scales: Scales = field(default_factory=Scales)
    calibrated: dict[str, Clipped] = field(default_factory=dict)
    """Tensor → what calibration data said of it; filled in by whoever runs the pass."""
    spreads: dict[str, Spread] = field(default_factory=dict)
    """Tensor → how its values lie on that data, where data was run; filled in likewise."""


class Ledger:
    """Numbers every rewrite of a run, over all its passes, from 1; ends a run after rewrite `stop_after`.

    `refused` rewrites, each a rule and the name of a node, are left out: their first offer takes a number all the
    same, so that those after them keep theirs.
    """

    def __init__(self, stop_after: int | None = None, refused: Collection[tuple[str, str]] = ()) -> None:
        self.stop_after = stop_after
        self.refused = frozenset(refused)
        self.offered: set[tuple[str, str]] = set()
        """Those of `refused` that a pass has offered."""
        self.taken = 0
        self.inferred: tuple[Graph, int] | None = None
        """The graph whose shapes were inferred last, and how many rewrites had been taken then."""

    def take(self, rule: str, node: str) -> int | None:
        """The number of the rewrite about to be done; None where it is not to be."""
        if (rule, node) in self.offered or (self.stop_after is not None and self.taken >= self.stop_after):
            return None
        self.taken += 1
        if (rule, node) in self.refused:
            self.offered.add((rule, node))
            return None
        return self.taken


Measured = Mapping[str, Array]
"""What was measured of one tensor or node: arrays of plain numbers, by name."""


class Activations(Protocol):
    """What tensors of a graph look like on calibration data; implemented by the compiler."""

    @property
    def held_out(self) -> Activations | None:
        """The same on samples that are none of these, for passes that judge what they do (`judge`)."""

    def amax(
        self, graph: Graph, tensors: Sequence[str], *, method: str, percentile: float, samples: int
    ) -> Mapping[str, float]:
        """For each tensor the magnitude that a symmetric quantizer should clip at, over `samples` samples."""

    def absolute_maximum(self, graph: Graph, tensors: Sequence[str]) -> Mapping[str, float]:
        """The largest magnitude that each tensor reaches on the data (infinite or NaN where it gets there)."""

    def recall(
        self,
        graph: Graph,
        kind: str,
        wanted: Mapping[str, object],
        samples: int | None,
        make: Callable[[Sequence[str]], Mapping[str, Measured]],
    ) -> Mapping[str, Measured]:
        """What `make` measures of the names in `wanted`, or has measured of them in an earlier compile.

        `make` is given the names that are not known. What it measures of one depends on the graph, the first `samples`
        samples, the code of the module `kind`, and the plain values in `wanted`, and on no other name.
        """

    def stream(
        self, graph: Graph, tensors: Sequence[str], samples: int | None = None
    ) -> Iterator[tuple[int, Mapping[str, Array]]]:
        """Sample by sample (numbered from 1) the values of `tensors`; nothing of a sample outlives its turn."""


class Storage(Protocol):
    """Keeps large tensors outside of memory; implemented by the compiler."""

    def hold(self, dtype: int, shape: tuple[int, ...], raw: memoryview) -> Weights:
        """The tensor whose bytes, as ONNX stores them, are `raw`."""


@dataclass
class Context:
    """What a run gives to its passes: the numbering of rewrites, and activations for those that need them."""

    ledger: Ledger = field(default_factory=Ledger)
    activations: Activations | None = None
    storage: Storage | None = None
    """Where large tensors that a pass makes stay until the model is written; None: in memory."""

    def keep(self, dtype: int, values: Array) -> Weights:
        """What a pass has computed, as a tensor of this ONNX type: where it is large, and the run has a place for
        such, it does not stay in memory. Values of a 4-bit type may come as int8 or uint8.
        """
        if dtype not in FOUR_BIT or values.dtype.itemsize > 1:
            values = values.astype(numpy_dtype(dtype), copy=False)
        raw = raw_values(values, dtype)
        if self.storage is not None and len(raw) >= STORED_FROM:
            return self.storage.hold(dtype, values.shape, raw)
        return Weights(dtype, values.shape, onnx.TensorProto(data_type=dtype, dims=values.shape, raw_data=bytes(raw)))

    def apply(self, result: PassResult, rule: str, node: Node, detail: str = "") -> bool:
        """Ask to do one rewrite at `node`: records it and answers True, or answers False where it is to be left out.

        After a False the pass goes on: the next rewrite may be wanted again.
        """
        number = self.ledger.take(rule, node.name)
        if number is None:
            return False
        result.rewrites.append(Applied(number, rule, node.name, module_of(node), detail))
        return True

    def infer_shapes(self, graph: Graph) -> None:
        """`graph.infer_shapes`; after rewrites of what they have left unknown, and nothing where there were none."""
        last = self.ledger.inferred
        if last is None or last[0] is not graph:
            infer_shapes(graph)
        elif last[1] != self.ledger.taken:
            infer_missing_shapes(graph)
        self.ledger.inferred = (graph, self.ledger.taken)


class Pass(BaseModel, ABC):
    """One step of a recipe. The class is its parameters, its recipe key, its help text and its documentation.

    The first line of the docstring says what it does; the rest gives the rewrite with shapes and dtypes,
    **Safety:**, and the source.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    after: ClassVar[tuple[str, ...]] = ()
    """Keys of passes that must stand before this one where a recipe has both; checked, never reordered."""
    needs: ClassVar[tuple[Need, ...]] = ()
    repeatable: ClassVar[bool] = True
    """Whether the result follows from the graph, the parameters, the data and the code of llmc alone."""
    real_caches: ClassVar[bool] = False
    """Whether verification on made-up inputs needs keys and values in the caches that the model has made itself."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Kinds of target that take what it makes, where not all do; checked before anything runs."""
    targets_reason: ClassVar[str] = ""
    """Why the others do not."""
    safety: ClassVar[Safety]

    @abstractmethod
    def run(self, graph: Graph, context: Context) -> PassResult:
        """Change `graph` in place and say what was done. Raises Skip, PassError or LlmcError."""

    def conflict(self, earlier: Pass) -> str | None:  # noqa: ARG002 - for those that have one
        """Why this pass must not stand after `earlier` in a recipe, as both are set; None where it may."""
        return None

    @classmethod
    def key(cls) -> str:
        """The name in recipes: FuseGelu → 'fuse-gelu', QuantizeInt8 → 'quantize-int8'."""
        return "-".join(re.findall(r"[A-Z]+(?![a-z])[0-9]*|[A-Z][a-z]*[0-9]*", cls.__name__)).lower()

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]


@cache
def discover() -> Mapping[str, type[Pass]]:
    """Every pass by its key: each class of each module below this package that says how safe it is."""
    import llmc.passes as package

    modules = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    found = {kind.key(): kind for module in modules for kind in _defined(module.name)}
    return MappingProxyType(dict(sorted(found.items())))


def find(key: str) -> type[Pass] | None:
    """The pass of that key, if there is one: its module alone is imported, which has the key's name."""
    module = _modules().get(key.replace("-", "_"))
    return next((kind for kind in _defined(module) if kind.key() == key), None) if module is not None else None


@cache
def _modules() -> Mapping[str, str]:
    """Name of each file in the rooms of this package → its module."""
    files = Path(__file__).parent.glob("*/*.py")
    return {file.stem: f"{__package__}.{file.parent.name}.{file.stem}" for file in sorted(files)}


def _defined(module: str) -> Iterator[type[Pass]]:
    """The passes that a module itself defines."""
    for value in vars(importlib.import_module(module)).values():
        own = isinstance(value, type) and value.__module__ == module
        if own and issubclass(value, Pass) and hasattr(value, "safety"):
            yield value
