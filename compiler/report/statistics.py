"""What the report says of a graph: operators, weights, inputs and outputs, FLOPs, precision of each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from llmc.compiler.report import DtypeWeights, GraphReport, LayerPrecision, TensorLine
from llmc.compiler.report.flops import count_flops
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    constant_bytes,
    constants,
    copy_graph,
    dtype_name,
    infer_shapes,
    module_of,
    onnx_dtype,
    scopes,
    shape_of,
)
from llmc.passes.shapes.dimension import summands

OPERANDS = {
    "MatMul": 2,
    "Gemm": 2,
    "Conv": 2,
    "ConvTranspose": 2,
    "Einsum": 2,
    "Attention": 3,
    "LSTM": 3,
    "GRU": 3,
    "RNN": 3,
    "MatMulInteger": 1,
    "ConvInteger": 1,
    "QLinearMatMul": 1,
    "QLinearConv": 1,
    "com.microsoft::MatMulNBits": 1,
    "com.microsoft::MatMulIntegerToFloat": 1,
    "llmc::CodebookMatMul": 1,
    "LayerNormalization": 1,
    "RMSNormalization": 1,
    "GroupNormalization": 1,
    "InstanceNormalization": 1,
    "BatchNormalization": 1,
    "Softmax": 1,
    "LogSoftmax": 1,
}
"""Layers whose precision is reported → how many of their first inputs decide it."""

_DATA_MOVEMENT = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}


def graph_report(graph: Graph, sizes: Mapping[str, int] | None = None) -> GraphReport:
    """What `graph` holds; FLOPs with symbolic dimensions at `sizes`. Weights are not loaded."""
    declared = {size for tensor in graph.inputs for size in shape_of(tensor) or () if isinstance(size, str)}
    named = {name for size in declared for name in summands(size)}
    used = {name: size for name, size in sorted((sizes or {}).items()) if name in named}
    flops, uncounted = count_flops(graph, used)
    return GraphReport(
        opset=graph.opset,
        nodes=count_operators(graph),
        inputs=[_tensor_line(tensor) for tensor in graph.inputs],
        outputs=[_tensor_line(tensor) for tensor in graph.outputs],
        weights=weights_by_dtype(graph),
        flops=flops,
        flops_uncounted=uncounted,
        sizes=used,
    )


def count_operators(graph: Graph) -> dict[str, int]:
    """Operator → nodes, subgraphs included, most frequent first; operators of other domains are 'domain::Operator'."""
    counts = Counter(operator_name(node) for scope in scopes(graph) for node in scope.nodes)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def operator_name(node: Node) -> str:
    """'Gelu', or 'com.microsoft::Gelu' where the operator is not ONNX's own."""
    return node.op if node.domain in (None, "", "ai.onnx") else f"{node.domain}::{node.op}"


def weights_by_dtype(graph: Graph) -> dict[str, DtypeWeights]:
    """dtype → number and bytes of constant values, largest first."""
    found: dict[str, DtypeWeights] = {}
    for constant in constants(graph):
        weights = found.setdefault(dtype_name(onnx_dtype(constant)), DtypeWeights(parameters=0, bytes=0))
        weights.parameters += prod(constant.shape)
        weights.bytes += constant_bytes(constant)
    return dict(sorted(found.items(), key=lambda item: (-item[1].bytes, item[0])))


def layer_precision(graph: Graph, asked: Mapping[str, str], kept: Mapping[str, str]) -> list[LayerPrecision]:
    """The precision of every layer with arithmetic, in graph order.

    `asked` is node name → dtype that the recipe asked for (where nothing was asked, the dtype found is taken as asked);
    `kept` is node name → why a pass left it alone. Found is the dtype that comes out of DequantizeLinear's input where
    all operands are dequantized, 'int8 weights' where only constants are, else the dtype of the layer's input.
    """
    typed = copy_graph(graph)
    infer_shapes(typed)
    layers = []
    for node in (node for scope in scopes(typed) for node in scope.nodes if operator_name(node) in OPERANDS):
        found = _found_precision(node)
        layer = LayerPrecision(
            node=node.name,
            op=node.op,
            module=module_of(node),
            asked=asked.get(node.name, found),
            found=found,
            reason=kept.get(node.name, ""),
        )
        layers.append(layer)
    return layers


def _found_precision(node: Node) -> str:
    if node.op in ("MatMulNBits", "CodebookMatMul"):
        return f"int{node.attrs.get('bits', 4)} weights"
    if node.op == "MatMulIntegerToFloat":  # its activation may be unsigned: INT8 arithmetic all the same
        return dtype_name(onnx_dtype(node.inputs[1]))
    operands = [tensor for tensor in node.inputs[: OPERANDS[operator_name(node)]] if tensor.name]
    stored = [_dequantized_from(tensor) for tensor in operands]
    quantized = [tensor for tensor in stored if tensor is not None]
    dtypes = list(dict.fromkeys(dtype_name(onnx_dtype(tensor)) for tensor in quantized))
    if quantized and len(quantized) == len(operands):
        return " × ".join(dtypes)
    if quantized and all(_is_constant(tensor) for tensor in quantized):
        return f"{' × '.join(dtypes)} weights"
    return dtype_name(onnx_dtype(node.inputs[0]))


def _dequantized_from(tensor: Tensor) -> Tensor | None:
    """The quantized tensor that `tensor` is the dequantized form of, seen through data movement; None for any other."""
    producer = _producer(tensor)
    while producer is not None and producer.op in _DATA_MOVEMENT:
        producer = _producer(producer.inputs[0])
    return producer.inputs[0] if producer is not None and producer.op == "DequantizeLinear" else None


def _is_constant(quantized: Tensor) -> bool:
    """Whether a quantized tensor is a constant, or is quantized in the graph from one."""
    producer = _producer(quantized)
    while producer is not None and producer.op in {*_DATA_MOVEMENT, "QuantizeLinear"}:
        quantized = producer.inputs[0]
        producer = _producer(quantized)
    return isinstance(quantized, Constant)


def _producer(tensor: Tensor) -> Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def _tensor_line(tensor: Tensor) -> TensorLine:
    shape = shape_of(tensor)
    return TensorLine(
        name=tensor.name, dtype=dtype_name(onnx_dtype(tensor)), shape=None if shape is None else list(shape)
    )
