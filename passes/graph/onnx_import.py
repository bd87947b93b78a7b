"""ONNX → Graph."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx

from llmc.passes.graph.collector import collector_paused
from llmc.passes.graph.edit import (
    free_name,
)
from llmc.passes.graph.functions import inline_all, inline_foreign
from llmc.passes.graph.onnx_export import to_structure
from llmc.passes.graph.tensors import (
    Array,
    Constant,
    FileRegion,
    Graph,
    Node,
    Structure,
    Tensor,
    Variable,
    Weights,
    extra_attributes,
    metadata,
    numpy_dtype,
    stored_bytes,
)

_ATTRIBUTE_FIELD = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
}


def load_model(path: Path) -> Graph:
    """Read an ONNX file whose external data, if any, stands beside it; weights stay on disk.

    Raises ValueError where a tensor's external data leaves the model's folder or is not there, in whole.
    """
    return from_model(onnx.load(os.fspath(path), load_external_data=False), path.parent)


def from_model(model: onnx.ModelProto, folder: Path | None = None) -> Graph:
    """Take a model in: functions inlined but for llmc's own operators, Constant nodes turned to constants.

    `folder` holds its external data.
    """
    return _import(inline_foreign(model), _Importer(folder, {}))


def from_structure(structure: Structure) -> Graph:
    """The graph again, with the very same values of constants (not copies)."""
    return _import(structure.model, _Importer(None, structure.weights))


@collector_paused()
def _import(model: onnx.ModelProto, importer: _Importer) -> Graph:
    importer.declared.update(_declarations(model.graph))
    importer.names.update(importer.declared)
    graph = importer.graph(model.graph, {})
    graph.import_domains = list(model.opset_import)
    graph.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    graph.ir_version = model.ir_version
    graph.producer_name, graph.producer_version = model.producer_name, model.producer_version
    graph.metadata = {entry.key: entry.value for entry in model.metadata_props}
    return graph


def _declarations(proto: onnx.GraphProto) -> Iterator[str]:
    """The names of a graph's values, once for each scope that declares them."""
    made = {name for node in proto.node for name in node.output}
    yield from made | {value.name for value in (*proto.input, *proto.initializer)}
    for node in proto.node:
        for attribute in node.attribute:
            if attribute.type == attribute.GRAPH:
                yield from _declarations(attribute.g)


class _Importer:
    def __init__(self, folder: Path | None, weights: Mapping[str, Array | Weights]) -> None:
        self.folder = folder
        self.weights = weights
        self.names: set[str] = set()
        self.node_names: set[str] = set()
        self.declared: Counter[str] = Counter()

    def graph(self, proto: onnx.GraphProto, outer: Mapping[str, Tensor]) -> Graph:
        scope: dict[str, Tensor] = {}
        for tensor in proto.initializer:
            scope[tensor.name] = self.unique(self.constant(tensor))
        for sparse in proto.sparse_initializer:
            scope[sparse.values.name] = self.unique(Constant(sparse.values.name, _dense(sparse)))
        for info in (*proto.input, *proto.value_info, *proto.output):
            if info.name not in scope:
                scope[info.name] = variable_of(info)
        outputs = {info.name for info in proto.output}
        nodes = [node for node in (self.node(n, scope, outer, outputs) for n in proto.node) if node is not None]
        return Graph(
            nodes=nodes,
            inputs=[scope[info.name] for info in proto.input if not isinstance(scope[info.name], Constant)],
            outputs=[_lookup(info.name, scope, outer) for info in proto.output],
            name=proto.name,
            doc_string=proto.doc_string,
        )

    def node(
        self, proto: onnx.NodeProto, scope: dict[str, Tensor], outer: Mapping[str, Tensor], outputs: set[str]
    ) -> Node | None:
        if proto.op_type == "Constant" and proto.domain in ("", "ai.onnx") and proto.output[0] not in outputs:
            value = _constant_value(proto)
            if value is not None:
                value.name = proto.output[0]
                scope[proto.output[0]] = self.unique(self.constant(value))
                return None
        attributes: dict[str, Any] = {}
        extra = []
        for attribute in proto.attribute:
            value = self.attribute(attribute, {**outer, **scope} if attribute.type == attribute.GRAPH else {})
            if value is None:
                extra.append(attribute)
            else:
                attributes[attribute.name] = value
        node = Node(
            op=proto.op_type,
            name=self.node_name(proto),
            attrs=attributes,
            inputs=[_lookup(name, scope, outer) for name in proto.input],
            outputs=[_lookup(name, scope, {}) for name in proto.output],
            domain=proto.domain or None,
        )
        if extra:
            extra_attributes(node).extend(extra)
        if proto.metadata_props:
            metadata(node).update({entry.key: entry.value for entry in proto.metadata_props})
        node.doc_string = proto.doc_string
        return node

    def node_name(self, proto: onnx.NodeProto) -> str:
        """The node's name, or that of its first output where it has none; unique, since reports go by it."""
        return free_name(proto.name or next((name for name in proto.output if name), proto.op_type), self.node_names)

    def attribute(self, proto: onnx.AttributeProto, scope: Mapping[str, Tensor]) -> Any:
        """The value as a Node holds it; None for what it cannot hold."""
        if proto.ref_attr_name:
            return None
        if proto.type == proto.GRAPH:
            return self.graph(proto.g, scope)
        if proto.type == proto.TENSOR:
            return self.constant(proto.t)
        try:
            if proto.type == proto.STRING:
                return proto.s.decode()
            if proto.type == proto.STRINGS:
                return [s.decode() for s in proto.strings] or None
        except UnicodeDecodeError:
            return None
        if proto.type not in _ATTRIBUTE_FIELD:
            return None
        value = getattr(proto, _ATTRIBUTE_FIELD[proto.type])
        return value if isinstance(value, int | float) else list(value) or None

    def unique(self, constant: Constant) -> Constant:
        """Constants of all scopes will be declared side by side: sibling subgraphs may have used one name twice."""
        if self.declared[constant.name] > 1:
            constant.name = free_name(constant.name, self.names)
        return constant

    def constant(self, tensor: onnx.TensorProto) -> Constant:
        source: FileRegion | onnx.TensorProto = tensor
        shape = tuple(tensor.dims)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if tensor.name in self.weights:
                return Constant(tensor.name, self.weights[tensor.name])
            source = self.region(tensor, stored_bytes(tensor.data_type, prod(shape)))
        if tensor.data_type == onnx.TensorProto.STRING:
            return Constant(tensor.name, onnx.numpy_helper.to_array(tensor))
        return Constant(tensor.name, Weights(tensor.data_type, shape, source))

    def region(self, tensor: onnx.TensorProto, nbytes: int) -> FileRegion:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        given = entries.get("offset", "0")
        if not given.isdigit():
            raise ValueError(f"tensor '{tensor.name}': external data offset '{given}' is not a number of bytes")
        offset = int(given)
        if self.folder is None:
            raise ValueError(f"tensor '{tensor.name}' has external data in '{location}', but no folder is given")
        path = self.folder / location
        inside = os.path.realpath(path).startswith(os.path.realpath(self.folder) + os.sep)
        if not location or Path(location).is_absolute() or not inside:
            raise ValueError(f"tensor '{tensor.name}': external data '{location}' is outside the model's folder")
        if not path.is_file():
            raise ValueError(f"tensor '{tensor.name}': external data file '{path}' is missing")
        if path.stat().st_size < offset + nbytes:
            raise ValueError(
                f"tensor '{tensor.name}': external data file '{path}' ends at byte {path.stat().st_size}, "
                f"the tensor needs bytes {offset} to {offset + nbytes}"
            )
        return FileRegion(path.resolve(), offset)


def _lookup(name: str, scope: dict[str, Tensor], outer: Mapping[str, Tensor]) -> Tensor:
    if not name:
        return Variable.empty()
    if name in scope:
        return scope[name]
    if name in outer:
        return outer[name]
    return scope.setdefault(name, Variable(name))


def variable_of(info: onnx.ValueInfoProto) -> Variable:
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        variable = Variable(info.name)
        variable.type_proto = info.type
        return variable
    dtype, shape = tensor_type(info.type.tensor_type)
    return Variable(info.name, dtype=dtype, shape=shape)


def tensor_type(proto: onnx.TypeProto.Tensor) -> tuple[np.dtype[Any] | None, list[int | str | None] | None]:
    """Element type and shape, None for what is not known."""
    shape = None
    if proto.HasField("shape"):
        shape = [d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in proto.shape.dim]
    return numpy_dtype(proto.elem_type) if proto.elem_type else None, shape


def _constant_value(proto: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor that a Constant node holds; None for sparse values, which stay a node."""
    (attribute,) = proto.attribute
    if attribute.name == "value":
        return cast(onnx.TensorProto, attribute.t)
    makers: dict[str, Any] = {
        "value_float": lambda a: np.array(a.f, np.float32),
        "value_floats": lambda a: np.array(a.floats, np.float32),
        "value_int": lambda a: np.array(a.i, np.int64),
        "value_ints": lambda a: np.array(a.ints, np.int64),
    }
    if attribute.name not in makers:
        return None
    return onnx.numpy_helper.from_array(makers[attribute.name](attribute))


def _dense(sparse: onnx.SparseTensorProto) -> Array:
    """A sparse initializer as a dense array (ONNX IR, "SparseTensorProto": linear or per-axis indices)."""
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dense: Array = np.zeros(tuple(sparse.dims), dtype=values.dtype)
    dense[np.unravel_index(indices, dense.shape) if indices.ndim == 1 else tuple(indices.T)] = values
    return dense


def copy_graph(graph: Graph) -> Graph:
    """An independent copy that shares the values of constants."""
    return from_structure(to_structure(graph))


def in_standard_operators(graph: Graph) -> Graph:
    """A copy in which llmc's own operators are spelled out; it shares the values of constants."""
    structure = to_structure(graph)
    return from_structure(Structure(inline_all(structure.model), structure.weights))
