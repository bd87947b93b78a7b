"""Gives tensors of a graph, of other float types, one of 16 bits, with Casts where two types meet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Set

import numpy as np

from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    fresh_names,
    metadata,
    numpy_dtype,
    onnx_dtype,
    outputs_of_scopes,
    remove_nodes,
    replace_uses,
    rewire,
    scopes,
)
from llmc.passes.precision.half import ANY_TYPE, Form, Half, as_half


class Retyping:
    """One conversion of a graph, in place.

    `forms`: id of each node that is to compute in `half` → what of it changes. `masks`: ids of those whose lowest
    numbers stand for minus infinity. `misfits`: ids of tensors → why `half` cannot hold them. `border`: ids of the
    inputs and outputs of the graph that change too.
    """

    def __init__(
        self,
        graph: Graph,
        half: Half,
        forms: Mapping[int, Form],
        masks: Collection[int],
        misfits: Mapping[int, str],
        border: Set[int],
    ) -> None:
        self.graph, self.half, self.forms = graph, half, forms
        self.masks, self.misfits, self.border = masks, misfits, border
        self.given_back = outputs_of_scopes(graph)
        self.fresh = fresh_names(graph)
        self.converted: dict[int, int] = {}
        """id of a tensor → the type that it had."""
        self.casts: dict[tuple[int, int], Tensor] = {}
        self.after: dict[int, list[Node]] = defaultdict(list)
        """id of a node, or of the graph for its inputs → the Casts that stand right after it."""
        self.constants: dict[tuple[int, float], tuple[Constant, Constant]] = {}

    def run(self) -> None:
        for tensor in self.graph.inputs:
            if self._changes_at_border(tensor):
                self._convert(tensor)
        for node in self.graph.nodes:
            if id(node) in self.forms:
                self._retype_results(node, self.forms[id(node)])
        self._retype_border()
        rewire(list(self._edges()))
        self._keep_names()
        placed = self.after[id(self.graph)]
        for node in self.graph.nodes:
            placed += [node, *self.after[id(node)]]
        self.graph.nodes = placed
        self._drop_idle_casts()

    def _convert(self, tensor: Tensor) -> None:
        self.converted[id(tensor)] = onnx_dtype(tensor)
        tensor.dtype = self.half.numpy

    def _changes_at_border(self, tensor: Tensor) -> bool:
        """Whether an input or output that is as it was is to change."""
        return id(tensor) in self.border - self.misfits.keys() and onnx_dtype(tensor) in self.half.sources

    def _retype_results(self, node: Node, form: Form) -> None:
        """Let a node make 16 bits, under a new name where the old one belongs to an output of the old type."""
        if node.op == "Cast":
            node.attrs["to"] = self.half.dtype
        if node.op == "DequantizeLinear" and node.attrs.get("output_dtype"):
            node.attrs["output_dtype"] = self.half.dtype
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value", Constant("value", np.zeros(1, np.float32)))
            node.attrs["value"] = as_half(value, value.name, self.half, self._floor(node))
        for index in form.outputs:
            tensor = node.outputs[index]
            if id(tensor) in self.given_back and id(tensor) not in self.border:
                made = self._cast_back(node, index, self.half.dtype)
                self.converted[id(made)] = onnx_dtype(tensor)
            else:
                self._convert(tensor)

    def _retype_border(self) -> None:
        """Let results that are outputs of the graph and are as they were be cast to 16 bits."""
        for tensor in {id(t): t for t in self.graph.outputs}.values():
            if tensor.inputs and self._changes_at_border(tensor):
                node = tensor.inputs[0]
                index = next(i for i, t in enumerate(node.outputs) if t is tensor)
                self._cast_back(node, index, onnx_dtype(tensor))
                tensor.dtype = self.half.numpy

    def _cast_back(self, node: Node, index: int, dtype: int) -> Variable:
        """Let the node make a new tensor of type `dtype`, of which the old one, an output, becomes a Cast."""
        tensor = node.outputs[index]
        other = onnx_dtype(tensor) if dtype == self.half.dtype else self.half.dtype
        made = Variable(self.fresh(f"{tensor.name}_{numpy_dtype(dtype).name}"), numpy_dtype(dtype), tensor.shape)
        node.outputs[index] = made
        replace_uses(tensor, made)
        self.casts[id(made), other] = tensor
        self._place_cast(node, made, tensor, other)
        return made

    def _place_cast(self, node: Node | None, source: Tensor, target: Tensor, dtype: int) -> None:
        name = self.fresh(f"{source.name}_to_{numpy_dtype(dtype).name}")
        cast = Node("Cast", name, {"to": dtype}, [source], [target])
        if node is not None:
            metadata(cast).update(metadata(node))
        self.after[id(node or self.graph)].append(cast)

    def _edges(self) -> Iterator[tuple[Node, int, Tensor]]:
        """What each node reads from now on, where that changes."""
        for scope in scopes(self.graph):
            for node in scope.nodes:
                form = self.forms.get(id(node))
                for index, tensor in enumerate(node.inputs):
                    if form is not None and index in form.inputs:
                        new = self._as_type(tensor, self.half.dtype, node)
                    elif id(tensor) in self.converted and index not in ANY_TYPE.get(node.op, ()):
                        new = self._as_type(tensor, self.converted[id(tensor)], node)
                    else:
                        continue
                    if new is not tensor:
                        yield node, index, new

    def _as_type(self, tensor: Tensor, dtype: int, user: Node) -> Tensor:
        """The tensor in the given type: itself, or its one Cast, or for a constant the converted one."""
        if isinstance(tensor, Constant):
            key = id(tensor), self._floor(user)
            if key not in self.constants:
                self.constants[key] = (
                    tensor,
                    as_half(tensor, self.fresh(f"{tensor.name}_{self.half.name}"), self.half, key[1]),
                )
            return self.constants[key][1]
        if onnx_dtype(tensor) == dtype:
            return tensor
        if (id(tensor), dtype) not in self.casts:
            name = self.fresh(f"{tensor.name}_{numpy_dtype(dtype).name}")
            cast = Variable(name, numpy_dtype(dtype), tensor.shape)
            self.casts[id(tensor), dtype] = cast
            self._place_cast(tensor.inputs[0] if tensor.inputs else None, tensor, cast, dtype)
        return self.casts[id(tensor), dtype]

    def _floor(self, user: Node) -> float:
        return self.half.fill if id(user) in self.masks else -self.half.largest

    def _keep_names(self) -> None:
        """Let a converted constant have the name of the one that nothing reads any more."""
        for old, new in self.constants.values():
            if not old.outputs and id(old) not in self.given_back and old.name:
                new.name, old.name = old.name, ""

    def _drop_idle_casts(self) -> None:
        """Remove Casts of the model whose two ends have become one type, or that have become what another one is."""
        idle: list[Node] = []
        for node in self.graph.nodes:
            if node.op != "Cast" or not ({id(node.inputs[0]), id(node.outputs[0])} & self.converted.keys()):
                continue
            (read,), (made,) = node.inputs, node.outputs
            same = read if onnx_dtype(read) == onnx_dtype(made) else self.casts.get((id(read), onnx_dtype(made)), made)
            if id(made) not in self.given_back and same is not made:
                replace_uses(made, same)
                idle.append(node)
            elif same is read and read.inputs and id(read) not in self.given_back:
                _make_instead(read, made)
                idle.append(node)
        remove_nodes(self.graph, idle)


def _make_instead(old: Tensor, new: Tensor) -> None:
    """Let the node that makes `old` make `new`, which is no other node's from then on, for all that read `old`."""
    (maker,) = old.inputs
    list.clear(new.inputs)
    replace_uses(old, new)
    maker.outputs[next(i for i, tensor in enumerate(maker.outputs) if tensor is old)] = new
