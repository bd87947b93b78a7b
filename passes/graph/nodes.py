"""What a graph is made of: nodes and the tensors between them, each of which knows the others.

Names and edges are those of onnx-graphsurgeon, whose users will feel at home. Objects here are equal only to
themselves, have no dictionary of their own, and change their edges without comparing: a graph may have 100,000 nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, SupportsIndex, cast

import numpy as np
import onnx

Array = np.ndarray[Any, np.dtype[Any]]


class Edges(list["Tensor"]):
    """The inputs or outputs of a node, in order; tensors that are put in or taken out learn of it."""

    __slots__ = ("node",)
    nodes: Callable[[Tensor], list[Node]]
    """Where a tensor keeps the nodes that have it here."""

    def __init__(self, node: Node, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        self.node = node
        for tensor in self:
            self.nodes(tensor).append(node)

    def __setitem__(self, index: Any, tensor: Any) -> None:
        self.nodes(self[index]).remove(self.node)
        super().__setitem__(index, tensor)
        self.nodes(tensor).append(self.node)

    def __delitem__(self, index: Any) -> None:
        self.pop(index)

    def append(self, tensor: Tensor) -> None:
        super().append(tensor)
        self.nodes(tensor).append(self.node)

    def insert(self, index: SupportsIndex, tensor: Tensor) -> None:
        super().insert(index, tensor)
        self.nodes(tensor).append(self.node)

    def extend(self, tensors: Iterable[Tensor]) -> None:
        for tensor in list(tensors):
            self.append(tensor)

    def pop(self, index: SupportsIndex = -1) -> Tensor:
        tensor = super().pop(index)
        self.nodes(tensor).remove(self.node)
        return tensor

    def remove(self, tensor: Tensor) -> None:
        self.pop(self.index(tensor))

    def clear(self) -> None:
        for tensor in self:
            self.nodes(tensor).remove(self.node)
        super().clear()


class Inputs(Edges):
    """What a node reads."""

    __slots__ = ()
    nodes = attrgetter("outputs")


class Outputs(Edges):
    """What a node makes."""

    __slots__ = ()
    nodes = attrgetter("inputs")


class Tensor:
    """A Variable or a Constant. `inputs` are the nodes that make it (one, or none), `outputs` those that read it.

    A node that reads it twice stands there twice.
    """

    __slots__ = ("_values", "dtype", "inputs", "name", "outputs", "shape", "type_proto")

    name: str
    inputs: list[Node]
    outputs: list[Node]
    dtype: Any
    """NumPy type; None where it is not known."""
    shape: Any
    """Integers, names, and None for an unknown size; None where the rank is not known."""
    type_proto: onnx.TypeProto | None
    """The type, where it is no tensor's: a sequence, an optional, a map."""

    def is_empty(self) -> bool:
        """Whether it stands for an optional input or output that is left out."""
        return not self.name

    def to_constant(self, values: Any) -> Constant:
        """Make this very tensor a constant; its edges stay."""
        self.__class__ = Constant
        self._values = values
        return cast(Constant, self)

    def __repr__(self) -> str:
        return f"{type(self).__name__} '{self.name}' {self.dtype}{self.shape}"


class Variable(Tensor):
    """A tensor that is computed, or is given to the graph."""

    __slots__ = ()

    def __init__(self, name: str, dtype: Any = None, shape: Sequence[int | str | None] | None = None) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.inputs, self.outputs = [], []
        self.type_proto = None

    @staticmethod
    def empty() -> Variable:
        """What stands for an optional input or output that is left out."""
        return Variable("")


class Constant(Tensor):
    """A tensor whose values are known: an array, or something with `dtype`, `shape` and `load()` that gives one."""

    __slots__ = ()

    def __init__(self, name: str, values: Any) -> None:
        self.name, self._values = name, values
        self.inputs, self.outputs = [], []
        self.type_proto = None

    @property
    def values(self) -> Any:
        """The array, held in memory from now on."""
        if not isinstance(self._values, np.ndarray):
            self._values = self._values.load()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values = values

    @property
    def dtype(self) -> Any:
        """NumPy type."""
        return self._values.dtype

    @property
    def shape(self) -> Any:
        """Integers."""
        return self._values.shape

    def copy(self) -> Constant:
        """Another constant of the same name and values, without edges."""
        return Constant(self.name, self._values)


class Node:
    """One operator: its attributes (numbers, strings, lists of them, Constants, Graphs), inputs and outputs."""

    __slots__ = ("attrs", "doc_string", "domain", "extra_attributes", "inputs", "metadata", "name", "op", "outputs")

    def __init__(
        self,
        op: str,
        name: str = "",
        attrs: dict[str, Any] | None = None,
        inputs: Iterable[Tensor] = (),
        outputs: Iterable[Tensor] = (),
        domain: str | None = None,
    ) -> None:
        self.op, self.name, self.domain = op, name, domain
        self.attrs: dict[str, Any] = {} if attrs is None else attrs
        self.inputs, self.outputs = Inputs(self, inputs), Outputs(self, outputs)
        self.doc_string = ""
        self.metadata: dict[str, str] = {}
        """What exporters leave beside a node: the module of the source model that it belongs to."""
        self.extra_attributes: list[onnx.AttributeProto] = []
        """Attributes of other kinds (types, sparse tensors, empty lists), as they came."""

    def subgraphs(self) -> Iterator[Graph]:
        """The graphs among its attributes."""
        return (value for value in self.attrs.values() if isinstance(value, Graph)) if self.attrs else iter(())

    def __repr__(self) -> str:
        return f"{self.op} '{self.name}'"


class Graph:
    """Nodes in topological order, and tensors that are given to them and given back. A subgraph sees outer tensors."""

    def __init__(
        self,
        nodes: Iterable[Node] = (),
        inputs: Iterable[Tensor] = (),
        outputs: Iterable[Tensor] = (),
        name: str = "graph",
        doc_string: str = "",
        opset: int = 11,
        import_domains: Sequence[onnx.OperatorSetIdProto] | None = None,
        producer_name: str = "",
        producer_version: str = "",
        ir_version: int | None = None,
    ) -> None:
        self.nodes, self.inputs, self.outputs = list(nodes), list(inputs), list(outputs)
        self.name, self.doc_string = name, doc_string
        self.opset, self.import_domains, self.ir_version = opset, import_domains, ir_version
        self.producer_name, self.producer_version = producer_name, producer_version
        self.metadata: dict[str, str] = {}
        self.inferences = 0
        """How often shapes were inferred: what changes a graph where no rewrite does."""

    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor, of this graph without its subgraphs."""
        found = (t for node in self.nodes for t in (*node.inputs, *node.outputs))
        return {t.name: t for t in (*self.inputs, *found, *self.outputs) if t.name}
