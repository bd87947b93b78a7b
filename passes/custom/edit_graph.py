"""The pass `edit-graph`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from llmc.passes.base import Context, LlmcError, Pass, PassResult, Safety, Skip
from llmc.passes.graph import Array, Graph, Node, Structure, Weights, from_structure, loaded, to_structure
from llmc.passes.opset import take_over

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


class EditGraph(Pass):
    """Runs a Python function of yours over the graph, as an onnx-graphsurgeon graph.

    `function` is called with an `onnx_graphsurgeon.Graph` and changes it in place, or returns another. Constants are
    read when the function asks for their values, and not before. What it leaves is cleaned up of unconnected nodes,
    sorted, checked and verified as after any other pass; the whole edit is one rewrite.

    **Safety:** lossy: only the function knows what it does.

    Source: onnx-graphsurgeon's documentation of Graph, Node and Tensor.
    """

    safety: ClassVar[Safety] = "lossy"
    repeatable: ClassVar[bool] = False

    function: str = Field(
        "",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="Where the function is: 'module:function', found as `python -c 'import module'` finds it.",
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError where there is no such function, or what it leaves is no graph."""
        if not self.function:
            raise Skip("no function is given")
        function = _find(self.function)
        result = PassResult()
        if not context.apply(result, self.function, Node(op="Edit", name="")):
            return result
        structure = to_structure(graph)
        given = _to_graphsurgeon(structure)
        edited = function(given)
        take_over(graph, from_structure(_from_graphsurgeon(given if edited is None else edited, self.function)))
        if not graph.outputs:
            raise LlmcError(f"edit-graph: {self.function} leaves a graph without outputs")
        return result


def _find(path: str) -> Callable[[gs.Graph], gs.Graph | None]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise LlmcError(f"edit-graph: '{path}' cannot be imported: {error}; add its folder to PYTHONPATH") from error
    if not callable(found):
        raise LlmcError(f"edit-graph: module '{module}' has no function '{name}'")
    return found  # type: ignore[no-any-return]


def _to_graphsurgeon(structure: Structure) -> gs.Graph:
    """With large constants left where they are until their values are asked for."""
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(structure.model)
    for tensor in _constants(graph):
        if tensor.name in structure.weights:
            tensor._values.held = structure.weights[tensor.name]
            tensor._values.load = partial(_load, structure.weights[tensor.name])
    return graph


def _load(held: Array | Weights) -> Array:
    """Values that may be written to: the graph's own are not."""
    return loaded(held).copy()


def _from_graphsurgeon(graph: Any, function: str) -> Structure:
    import onnx_graphsurgeon as gs

    if not isinstance(graph, gs.Graph):
        raise LlmcError(f"edit-graph: {function} returns {type(graph).__name__}, not an onnx-graphsurgeon graph")
    graph.cleanup().toposort()
    untouched = {}
    for tensor in _constants(graph):
        if hasattr(tensor._values, "held"):
            untouched[tensor.name] = tensor._values.held
        else:
            tensor.data_location = None  # graphsurgeon would go on saying that its values stand in a file
    return Structure(gs.export_onnx(graph, do_type_check=False), untouched)


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Those of the graph and its subgraphs."""
    import onnx_graphsurgeon as gs

    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            yield tensor
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from _constants(value)
