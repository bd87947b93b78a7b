"""The Graph that passes see: one onnx-graphsurgeon graph, taken from ONNX and given back with nothing lost.

graphsurgeon's own importer drops what this project lives on (metadata, which names the source module of a
node), some kinds of attributes, and the place of weights on disk; so the two directions are written here,
on graphsurgeon's classes.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
from onnx_graphsurgeon import Constant as Constant
from onnx_graphsurgeon import Graph as Graph
from onnx_graphsurgeon import Node as Node
from onnx_graphsurgeon import Tensor as Tensor
from onnx_graphsurgeon import Variable as Variable
from onnx_graphsurgeon.ir.tensor import LazyValues

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int | str | None, ...]

SMALL = 1024
"""Bytes. Smaller constants always stand inside the graph proto; larger ones may stay in a file."""

FOUR_BIT = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1}
EXTERNAL_FROM = 256 << 20
"""Bytes of weights from which a saved model keeps them in a file of their own (protobuf ends at 2 GB)."""
ALIGNMENT = 4096
"""Bytes; a page, so that every tensor of an external data file can be mapped by itself."""

_ATTRIBUTE_FIELD = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
}


class Weights(LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
    """The values of a constant, left where they are (a file, or the proto that was loaded) until asked for.

    `load()` gives a read-only array that views the file's pages: reading weights costs no anonymous memory.
    """

    def __init__(self, onnx_dtype: int, shape: tuple[int, ...], source: FileRegion | onnx.TensorProto) -> None:
        self.onnx_dtype = onnx_dtype
        self.shape = shape
        self.dtype = numpy_dtype(onnx_dtype)
        self.source = source
        self.nbytes = stored_bytes(onnx_dtype, prod(shape))

    def load(self) -> Array:
        """The values, shaped and typed; a view of mapped pages where the layout allows it."""
        if isinstance(self.source, onnx.TensorProto):
            if self.source.HasField("raw_data") and self.onnx_dtype not in FOUR_BIT and self.nbytes:
                return np.frombuffer(self.source.raw_data, dtype=self.dtype).reshape(self.shape)
            return cast(Array, onnx.numpy_helper.to_array(self.source))
        if not self.nbytes:
            return np.empty(self.shape, dtype=self.dtype)
        raw: Array = np.memmap(
            self.source.path, dtype=np.uint8, mode="r", offset=self.source.offset, shape=(self.nbytes,)
        )
        if self.onnx_dtype in FOUR_BIT:
            return unpack_four_bit(raw, self.dtype, self.shape)
        return raw.view(self.dtype).reshape(self.shape)


class Derived(Weights):
    """Values made from other values each time they are asked for: a large result takes no memory while nobody reads it.

    `make` gives an array of this type and shape, and the same one every time.
    """

    def __init__(self, onnx_dtype: int, shape: tuple[int, ...], make: Callable[[], Array]) -> None:
        super().__init__(onnx_dtype, shape, onnx.TensorProto())
        self.make = make

    def load(self) -> Array:
        return self.make()


@dataclass(frozen=True)
class FileRegion:
    """Where a tensor's bytes stand in a file: `offset` in bytes from its start."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Structure:
    """A model without its large weights: the proto refers to them as external data, `weights` has them by name."""

    model: onnx.ModelProto
    weights: Mapping[str, Array | Weights]


def unpack_four_bit(raw: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Two values a byte, the first in the low nibble (ONNX, "4-bit integer types") → one value an element."""
    nibbles = np.stack([raw & 0x0F, raw >> 4], axis=-1).reshape(-1)[: prod(shape)]
    return (
        nibbles.astype(np.uint8).view(dtype).reshape(shape)
        if dtype != ml_dtypes.int4
        else (((nibbles.astype(np.int8) ^ 8) - 8).astype(ml_dtypes.int4).reshape(shape))
    )


def stored_bytes(onnx_dtype: int, count: int) -> int:
    """Bytes that `count` values of an ONNX type take in a file (4-bit types: two values a byte)."""
    if onnx_dtype in FOUR_BIT:
        return (count + 1) // 2
    if onnx_dtype == onnx.TensorProto.STRING:
        return 0
    return count * numpy_dtype(onnx_dtype).itemsize


@cache
def numpy_dtype(onnx_dtype: int) -> np.dtype[Any]:
    """The NumPy (or ml_dtypes) type of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_dtype))


def onnx_dtype(tensor: Tensor) -> int:
    """The ONNX element type of a tensor; `UNDEFINED` (0) where it is not known."""
    dtype = tensor.dtype
    if dtype is None:
        return onnx.TensorProto.UNDEFINED
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def dtype_name(onnx_dtype: int) -> str:
    """'float32', 'bfloat16', 'int8' …: the name that reports and recipes use."""
    return numpy_dtype(onnx_dtype).name if onnx_dtype else "unknown"


def shape_of(tensor: Tensor) -> Shape | None:
    """Dimensions as integers, names or None for an unknown one; None where the rank itself is unknown."""
    return None if tensor.shape is None else tuple(tensor.shape)


def metadata(node: Node) -> dict[str, str]:
    """The node's metadata (exporters put the source module there); writable."""
    return cast("dict[str, str]", node.__dict__.setdefault("metadata", {}))


def extra_attributes(node: Node) -> list[onnx.AttributeProto]:
    """Attributes that graphsurgeon cannot hold (types, sparse tensors, empty lists); kept as they came."""
    return cast("list[onnx.AttributeProto]", node.__dict__.setdefault("extra_attributes", []))


def module_of(node: Node) -> str:
    """The source module of a node ('encoder.layer.3.attention'), '' where the exporter left none.

    torch.onnx writes `pkg.torch.onnx.name_scopes`, a Python list of scopes from the model to the operator.
    """
    scopes = metadata(node).get("pkg.torch.onnx.name_scopes", "")
    names = [part.strip(" '\"[]") for part in scopes.split(",")]
    return next((name for name in reversed(names[:-1]) if name), "")


# ONNX → Graph


def load_model(path: Path) -> Graph:
    """Read an ONNX file whose external data, if any, stands beside it; weights stay on disk.

    Raises ValueError where a tensor's external data leaves the model's folder or is not there, in whole.
    """
    return from_model(onnx.load(os.fspath(path), load_external_data=False), path.parent)


def from_model(model: onnx.ModelProto, folder: Path | None = None) -> Graph:
    """Take a model in: local functions inlined, Constant nodes turned to constants, `folder` holding external data."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return _import(model, _Importer(folder, {}))


def from_structure(structure: Structure) -> Graph:
    """The graph again, with the very same values of constants (not copies)."""
    return _import(structure.model, _Importer(None, structure.weights))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No cyclic garbage collection inside: while a graph is built it finds nothing, and takes half of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@_collector_paused()
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
                scope[info.name] = _variable(info)
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
        attributes: OrderedDict[str, Any] = OrderedDict()
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
        return _free_name(proto.name or next((name for name in proto.output if name), proto.op_type), self.node_names)

    def attribute(self, proto: onnx.AttributeProto, scope: Mapping[str, Tensor]) -> Any:
        """The value as graphsurgeon holds it; None for what it cannot hold."""
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
            constant.name = _free_name(constant.name, self.names)
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


def _variable(info: onnx.ValueInfoProto) -> Variable:
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        variable = Variable(info.name, type=kind or "tensor_type")
        variable.type_proto = info.type
        return variable
    dtype, shape = _tensor_type(info.type.tensor_type)
    return Variable(info.name, dtype=dtype, shape=shape)


def _tensor_type(proto: onnx.TypeProto.Tensor) -> tuple[np.dtype[Any] | None, list[int | str | None] | None]:
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


# Graph → ONNX


@_collector_paused()
def to_structure(graph: Graph, *, inline_below: int = SMALL) -> Structure:
    """The model with every constant of `inline_below` bytes or more left out, as a reference to external data."""
    weights: dict[str, Array | Weights] = {}
    proto = _export_graph(graph, weights, inline_below)
    model = onnx.helper.make_model(proto, opset_imports=_opset_imports(graph))
    model.ir_version = max(graph.ir_version or 0, onnx.helper.find_min_ir_version_for(list(model.opset_import), True))
    model.producer_name, model.producer_version = graph.producer_name or "", graph.producer_version or ""
    onnx.helper.set_model_props(model, graph.__dict__.get("metadata", {}))
    return Structure(model, weights)


def to_model(graph: Graph) -> onnx.ModelProto:
    """The whole model in one proto, weights inside: for graphs well under protobuf's 2 GB."""
    return to_structure(graph, inline_below=1 << 62).model


def save_model(graph: Graph, path: Path, *, inline_below: int | None = None) -> list[Path]:
    """Write the model to `path`; returns the files written.

    Models whose weights are under `EXTERNAL_FROM` bytes stand in one file; larger ones keep their weights in
    `<path>.data` beside it, each aligned to 4096 bytes so that it can be mapped, written one tensor at a time.
    """
    if inline_below is None:
        total = sum(constant_bytes(c) for c in constants(graph))
        inline_below = 1 << 62 if total < EXTERNAL_FROM else SMALL
    structure = to_structure(graph, inline_below=inline_below)
    if not structure.weights:
        path.write_bytes(structure.model.SerializeToString(deterministic=True))
        return [path]
    data = path.with_name(path.name + ".data")
    with data.open("wb") as file:
        for tensor in structure.model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offset = file.tell()
            file.write(raw_values(structure.weights[tensor.name], tensor.data_type))
            _refer(tensor, data.name, offset, file.tell() - offset)
    path.write_bytes(structure.model.SerializeToString(deterministic=True))
    return [path, data]


def constants(graph: Graph) -> Iterator[Constant]:
    """Every constant that the graph or a subgraph uses, once each, in order of first use."""
    seen: set[int] = set()
    for scope in scopes(graph):
        for tensor in (*(t for node in scope.nodes for t in node.inputs), *scope.outputs):
            if isinstance(tensor, Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def constant_bytes(constant: Constant) -> int:
    """Bytes that the constant's values take in a file."""
    return stored_bytes(onnx_dtype(constant), prod(constant.shape))


def raw_values(values: Array | Weights, onnx_dtype: int) -> memoryview:
    """The bytes that ONNX stores for a tensor (little-endian, row-major; 4-bit types packed)."""
    array = values.load() if isinstance(values, Weights) else values
    if onnx_dtype in FOUR_BIT:
        return memoryview(onnx.numpy_helper.from_array(array).raw_data)
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _export_graph(
    graph: Graph, weights: dict[str, Array | Weights], inline_below: int, outer: bool = True
) -> onnx.GraphProto:
    """One graph proto. The outermost declares the constants of all, so that subgraphs may share them; only a
    subgraph's own outputs must be declared inside it."""
    inner_outputs = {id(t) for sub in scopes(graph)[1:] for t in sub.outputs} if outer else set()
    declared = (
        [c for c in constants(graph) if id(c) not in inner_outputs]
        if outer
        else [t for t in graph.outputs if isinstance(t, Constant)]
    )
    boundary = {t.name for t in (*graph.inputs, *graph.outputs)}
    made = [t for node in graph.nodes for t in node.outputs if t.name and t.name not in boundary]
    return onnx.helper.make_graph(
        nodes=[_export_node(node, weights, inline_below) for node in graph.nodes],
        name=graph.name or "graph",
        inputs=[_value_info(t) for t in graph.inputs],
        outputs=[_value_info(t) for t in graph.outputs],
        initializer=[_export_constant(c, weights, inline_below) for c in declared],
        doc_string=graph.doc_string or "",
        value_info=[_value_info(t) for t in made if t.dtype is not None or "type_proto" in t.__dict__],
    )


def _export_node(node: Node, weights: dict[str, Array | Weights], inline_below: int) -> onnx.NodeProto:
    proto = onnx.NodeProto(
        op_type=node.op,
        input=[t.name for t in node.inputs],
        output=[t.name for t in node.outputs],
        name=node.name,
        domain=node.domain,
        doc_string=node.__dict__.get("doc_string", ""),
    )
    for name, value in node.attrs.items():
        if isinstance(value, Graph):
            value = _export_graph(value, weights, inline_below, outer=False)
        elif isinstance(value, Constant):
            value = _export_constant(value, {}, 1 << 62)
        proto.attribute.append(onnx.helper.make_attribute(name, value))
    proto.attribute.extend(node.__dict__.get("extra_attributes", ()))
    for key, text in node.__dict__.get("metadata", {}).items():
        proto.metadata_props.add(key=key, value=text)
    return proto


def _export_constant(constant: Constant, weights: dict[str, Array | Weights], inline_below: int) -> onnx.TensorProto:
    values = constant._values
    if isinstance(values, np.ndarray) and values.dtype.kind in "OSU":
        return onnx.numpy_helper.from_array(values.astype(object), constant.name)
    proto = onnx.TensorProto(name=constant.name, data_type=onnx_dtype(constant), dims=values.shape)
    nbytes = stored_bytes(proto.data_type, prod(values.shape))
    if nbytes >= inline_below:
        weights[constant.name] = values
        _refer(proto, "weights", 0, nbytes)
    else:
        proto.raw_data = bytes(raw_values(values, proto.data_type))
    return proto


def _refer(proto: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    del proto.external_data[:]
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    info = onnx.ValueInfoProto(name=tensor.name)
    if "type_proto" in tensor.__dict__:
        info.type.CopyFrom(tensor.type_proto)
        return info
    info.type.tensor_type.elem_type = onnx_dtype(tensor)
    shape = shape_of(tensor)
    if shape is not None:
        info.type.tensor_type.shape.SetInParent()
        for size in shape:
            dimension = info.type.tensor_type.shape.dim.add()
            if isinstance(size, str):
                dimension.dim_param = size
            elif size is not None:
                dimension.dim_value = size
    return info


def _opset_imports(graph: Graph) -> list[onnx.OperatorSetIdProto]:
    """The declared domains, and version 1 of every other one that a node uses; the default domain at `graph.opset`."""
    versions = {o.domain if o.domain != "ai.onnx" else "": o.version for o in graph.import_domains or []}
    versions[""] = graph.opset
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.domain and node.domain != "ai.onnx":
                versions.setdefault(node.domain, 1)
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]


# Questions about a graph


def scopes(graph: Graph) -> list[Graph]:
    """The graph and its subgraphs, outer ones before inner ones."""
    found = [graph]
    for scope in found:
        found.extend(v for node in scope.nodes if node.attrs for v in node.attrs.values() if isinstance(v, Graph))
    return found


def outputs_of_scopes(graph: Graph) -> set[int]:
    """The ids of the tensors that the graph or a subgraph gives back."""
    return {id(tensor) for scope in scopes(graph) for tensor in scope.outputs}


def load_values(constant: Constant) -> Array:
    """The values; unlike `Constant.values` it does not make the constant hold them in memory from then on."""
    values = constant._values
    return cast(Array, values.load() if isinstance(values, Weights) else values)


def to_node(node: Node) -> onnx.NodeProto:
    """The node alone, as ONNX writes it."""
    return _export_node(node, {}, 1 << 62)


def fresh_names(graph: Graph) -> Callable[[str], str]:
    """A function that makes names for nodes and tensors which nothing in the graph or its subgraphs has yet."""
    taken: set[str] = set()

    def fresh(wanted: str) -> str:
        if not taken:
            taken.update(_names(graph))
        return _free_name(wanted, taken)

    return fresh


def _names(graph: Graph) -> Iterator[str]:
    """The names of all nodes and tensors, '' among them."""
    yield ""
    for scope in scopes(graph):
        yield from (t.name for t in (*scope.inputs, *scope.outputs))
        for node in scope.nodes:
            yield node.name
            yield from (t.name for t in (*node.inputs, *node.outputs))


def _free_name(wanted: str, taken: set[str]) -> str:
    """`wanted`, or with the first number behind it that makes a name not in `taken`; then it is."""
    name = wanted
    if name in taken:
        name = next(n for n in (f"{wanted}_{i}" for i in itertools.count(1)) if n not in taken)
    taken.add(name)
    return name


def replace_uses(old: Tensor, new: Tensor) -> None:
    """Let every node that reads `old` read `new`; outputs of graphs stay. Linear in the number of uses."""
    users = {id(node): node for node in old.outputs}
    list.clear(old.outputs)
    for node in users.values():
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                list.__setitem__(node.inputs, index, new)
                list.append(new.outputs, node)


def rewire(edges: Iterable[tuple[Node, int, Tensor]]) -> None:
    """Let each node read the given tensor at the given position. Linear in the edges of the tensors that it touches."""
    left: dict[int, Tensor] = {}
    for node, index, tensor in edges:
        left[id(node.inputs[index])] = node.inputs[index]
        list.__setitem__(node.inputs, index, tensor)
        list.append(tensor.outputs, node)
    for tensor in left.values():
        users = {id(node): node for node in tensor.outputs}.values()
        list.__setitem__(tensor.outputs, slice(None), [n for n in users for read in n.inputs if read is tensor])


def remove_nodes(scope: Graph, nodes: Iterable[Node]) -> None:
    """Take nodes, with their subgraphs, out of one scope. Linear in the scope and in what the nodes touch."""
    gone: dict[int, Node] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        gone[id(node)] = node
        pending.extend(inner for subgraph in node.subgraphs() for inner in subgraph.nodes)
    touched = {id(t): t for node in gone.values() for t in (*node.inputs, *node.outputs)}
    for tensor in touched.values():
        for edges in (tensor.inputs, tensor.outputs):
            list.__setitem__(edges, slice(None), [n for n in edges if id(n) not in gone])
    for node in gone.values():
        list.clear(node.inputs)
        list.clear(node.outputs)
    scope.nodes = [node for node in scope.nodes if id(node) not in gone]


def copy_graph(graph: Graph) -> Graph:
    """An independent copy that shares the values of constants."""
    return from_structure(to_structure(graph))


def constant_source(tensor: Tensor) -> Constant | None:
    """The constant that a tensor is, or is an Identity or Cast of; None for any other tensor. Loads nothing."""
    while not isinstance(tensor, Constant):
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is None or producer.domain or producer.op not in ("Identity", "Cast"):
            return None
        tensor = producer.inputs[0]
    return tensor


def constant_value(tensor: Tensor) -> Array | None:
    """The value of a tensor that is constant, seen through Identity and Cast nodes; None for any other."""
    if isinstance(tensor, Constant):
        return cast(Array, tensor.values)
    producer = tensor.inputs[0] if tensor.inputs else None
    if producer is None or producer.domain or producer.op not in ("Identity", "Cast"):
        return None
    value = constant_value(producer.inputs[0])
    if value is None or producer.op == "Identity":
        return value
    return value.astype(numpy_dtype(producer.attrs["to"]))


def unlink(node: Node) -> None:
    """Take a node's edges away, comparing by identity (graphsurgeon's own lists compare nodes by content, slowly)."""
    for tensor in node.inputs:
        _drop(tensor.outputs, node)
    for tensor in node.outputs:
        _drop(tensor.inputs, node)
    list.clear(node.inputs)
    list.clear(node.outputs)


def _drop(nodes: list[Node], node: Node) -> None:
    for index, candidate in enumerate(nodes):
        if candidate is node:
            list.__delitem__(nodes, index)
            return


@_collector_paused()
def infer_shapes(graph: Graph) -> None:
    """Write the types and shapes that ONNX's inference finds (data propagation on) to the tensors of all scopes.

    Weights are not read. A shape known before and lost by the inference is kept.
    """
    _write_shapes(graph, onnx.shape_inference.infer_shapes(to_structure(graph).model, data_prop=True).graph)


def _write_shapes(graph: Graph, inferred: onnx.GraphProto) -> None:
    made = {t.name: t for node in graph.nodes for t in node.outputs if not isinstance(t, Constant)}
    for info in (*inferred.value_info, *inferred.output):
        tensor = made.get(info.name)
        if tensor is None or info.type.WhichOneof("value") != "tensor_type":
            continue
        dtype, shape = _tensor_type(info.type.tensor_type)
        if dtype is not None:
            tensor.dtype = dtype
        if shape is not None:
            tensor.shape = _merge_shapes(tensor.shape, shape)
    for node, proto in zip(graph.nodes, inferred.node, strict=True):
        for name, value in node.attrs.items():
            if isinstance(value, Graph):
                _write_shapes(value, next(a.g for a in proto.attribute if a.name == name))


def _merge_shapes(old: list[int | str | None] | None, new: list[int | str | None]) -> list[int | str | None]:
    """Dimension by dimension the better known: a number before a name, a name before nothing."""
    if old is None or len(old) != len(new):
        return new
    return [n if isinstance(n, int) or (o is None) else o for o, n in zip(old, new, strict=True)]


def digest(graph: Graph) -> str:
    """SHA-256 over the graph's proto and the values of its constants, independent of where weights are stored."""
    structure = to_structure(graph)
    sha = hashlib.sha256(structure.model.SerializeToString(deterministic=True))
    for name in sorted(structure.weights):
        values = structure.weights[name]
        sha.update(name.encode())
        sha.update(raw_values(values, onnx.helper.np_dtype_to_tensor_dtype(values.dtype)))
    return sha.hexdigest()
