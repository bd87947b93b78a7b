"""Graph → ONNX."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod

import numpy as np
import onnx

from llmc.passes.graph.collector import collector_paused
from llmc.passes.graph.edit import (
    constants,
    scopes,
)
from llmc.passes.graph.functions import bodies
from llmc.passes.graph.tensors import (
    FOUR_BIT,
    SMALL,
    Array,
    Constant,
    Graph,
    Node,
    Structure,
    Tensor,
    Weights,
    blocks_of,
    contiguous,
    loaded,
    onnx_dtype,
    pack_four_bit,
    shape_of,
    stored_bytes,
)


@collector_paused()
def to_structure(graph: Graph, *, inline_below: int = SMALL) -> Structure:
    """The model with every constant of `inline_below` bytes or more left out, as a reference to external data."""
    weights: dict[str, Array | Weights] = {}
    proto = _export_graph(graph, weights, inline_below)
    model = onnx.helper.make_model(proto, opset_imports=_opset_imports(graph))
    model.functions.extend(bodies((node for scope in scopes(graph) for node in scope.nodes), graph.opset))
    model.ir_version = max(graph.ir_version or 0, onnx.helper.find_min_ir_version_for(list(model.opset_import), True))
    model.producer_name, model.producer_version = graph.producer_name or "", graph.producer_version or ""
    onnx.helper.set_model_props(model, graph.metadata)
    return Structure(model, weights)


def to_model(graph: Graph) -> onnx.ModelProto:
    """The whole model in one proto, weights inside: for graphs well under protobuf's 2 GB."""
    return to_structure(graph, inline_below=1 << 62).model


def raw_values(values: Array | Weights, onnx_dtype: int) -> memoryview:
    """The bytes that ONNX stores for a tensor (little-endian, row-major; 4-bit types packed, from elements of 8 bits
    too)."""
    array = loaded(values)
    if onnx_dtype in FOUR_BIT:
        return pack_four_bit(array).data
    return contiguous(array).reshape(-1).view(np.uint8).data


def raw_blocks(values: Array | Weights, onnx_dtype: int) -> Iterator[memoryview]:
    """`raw_values` piece by piece: of a large weight no more need be computed, or copied, at a time."""
    if onnx_dtype in FOUR_BIT:
        yield raw_values(values, onnx_dtype)
        return
    for block in blocks_of(values):
        yield raw_values(block, onnx_dtype)


def _export_graph(
    graph: Graph, weights: dict[str, Array | Weights], inline_below: int, outer: bool = True
) -> onnx.GraphProto:
    """One graph proto. The outermost declares the constants of all, so that subgraphs may share them; only a
    subgraph's own outputs must be declared inside it, and stay in the proto whatever their size."""
    inner_outputs = {id(t) for sub in scopes(graph)[1:] for t in sub.outputs} if outer else set()
    declared = (
        [c for c in constants(graph) if id(c) not in inner_outputs]
        if outer
        else [t for t in graph.outputs if isinstance(t, Constant)]
    )
    own_below = inline_below if outer else 1 << 62
    boundary = {t.name for t in (*graph.inputs, *graph.outputs)}
    made = [t for node in graph.nodes for t in node.outputs if t.name and t.name not in boundary]
    return onnx.helper.make_graph(
        nodes=[_export_node(node, weights, inline_below) for node in graph.nodes],
        name=graph.name or "graph",
        inputs=[_value_info(t) for t in graph.inputs],
        outputs=[_value_info(t) for t in graph.outputs],
        initializer=[_export_constant(c, weights, own_below) for c in declared],
        doc_string=graph.doc_string or "",
        value_info=[_value_info(t) for t in made if t.dtype is not None or t.type_proto is not None],
    )


def _export_node(node: Node, weights: dict[str, Array | Weights], inline_below: int) -> onnx.NodeProto:
    proto = onnx.NodeProto(
        op_type=node.op,
        input=[t.name for t in node.inputs],
        output=[t.name for t in node.outputs],
        name=node.name,
        domain=node.domain,
        doc_string=node.doc_string,
    )
    for name, value in node.attrs.items():
        if isinstance(value, Graph):
            value = _export_graph(value, weights, inline_below, outer=False)
        elif isinstance(value, Constant):
            value = _export_constant(value, {}, 1 << 62)
        proto.attribute.append(onnx.helper.make_attribute(name, value))
    proto.attribute.extend(node.extra_attributes)
    for key, text in node.metadata.items():
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
        refer(proto, "weights", 0, nbytes)
    else:
        proto.raw_data = bytes(raw_values(values, proto.data_type))
    return proto


def refer(proto: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make `proto` stand for `length` bytes from `offset` of the file `location`."""
    del proto.external_data[:]
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    info = onnx.ValueInfoProto(name=tensor.name)
    if tensor.type_proto is not None:
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


def to_node(node: Node) -> onnx.NodeProto:
    """The node alone, as ONNX writes it."""
    return _export_node(node, {}, 1 << 62)


def digest(graph: Graph) -> str:
    """SHA-256 over the graph's proto and the values of its constants, independent of where weights are stored."""
    structure = to_structure(graph)
    sha = hashlib.sha256(structure.model.SerializeToString(deterministic=True))
    for name in sorted(structure.weights):
        values = structure.weights[name]
        sha.update(name.encode())
        for block in raw_blocks(values, onnx.helper.np_dtype_to_tensor_dtype(values.dtype)):
            sha.update(block)
    return sha.hexdigest()
