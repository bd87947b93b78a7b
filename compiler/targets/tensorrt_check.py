"""What TensorRT would build wrong without a word, or refuse late and unclearly: found in the graph, before building.

Everything here was seen on TensorRT-RTX 1.7 and its ONNX parser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set

import onnx
from onnx import TensorProto

from llmc.compiler.targets.tensorrt_import import PRODUCT, Kind
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    copy_graph,
    dtype_name,
    infer_shapes,
    onnx_dtype,
    scopes,
    shape_of,
)

OPSETS = range(9, 26)
"""Opsets that the parser knows; it takes the header of any other and reads its operators as it pleases."""
RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)
RTX_DEFAULT = (80, 86, 89, 120)
"""Built for where the user names none: every generation since Ampere that is sold as a graphics card."""

_FROM_AMPERE = (80, 86, 89, 120, 121)
_CAPABILITIES_OF: dict[int, tuple[int, ...]] = {
    TensorProto.BFLOAT16: _FROM_AMPERE,
    TensorProto.INT4: _FROM_AMPERE,
    TensorProto.FLOAT8E4M3FN: (89, 120, 121),
    TensorProto.FLOAT4E2M1: (120, 121),
}
_WITHOUT_FP32_PRODUCT = {75}
"""Compute capabilities for which there is no product of float32 matrices."""
_PRODUCTS = {"MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN"}

_TYPES = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.BOOL,
    TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64,
    TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1, TensorProto.UNDEFINED,
}  # fmt: skip
_QUANTIZED = {TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1}
_CACHED = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.UNDEFINED}
"""Types of the caches that TensorScatter writes into."""
_RTX_WITHOUT_KERNEL = {"NonZero", "NonMaxSuppression"}
"""Operators that the RTX parser says it supports, and then cannot build."""
_TENSORRT_DOMAIN = "trt"
"""Domain of TensorRT's own operators in ONNX (`TRT_MXFP8DynamicQuantize` …)."""

Check = Callable[[Node], Iterable[str]]


def check_graph(graph: Graph, kind: Kind, capabilities: Sequence[int], unsupported: Set[str]) -> list[str]:
    """One line for each kind of problem, naming the first of its nodes.

    `capabilities` are SM numbers (TensorRT-RTX only); `unsupported` are the operators of the default domain for
    which the ONNX parser has no importer.
    """
    if not graph.nodes or not graph.outputs:
        return ["the graph is empty: it has no nodes, or no outputs"]
    problems = []
    if graph.opset not in OPSETS:
        least, largest = OPSETS[0], OPSETS[-1]
        problems.append(f"the graph is of opset {graph.opset}; {PRODUCT[kind]} reads {least} to {largest}: convert it")
    missing = unsupported | (_RTX_WITHOUT_KERNEL if kind == "tensorrt-rtx" else set())
    checks: tuple[Check, ...] = (
        lambda node: _operator(node, missing),
        _attention,
        _cache,
        _zero_point,
        _blocks,
        _types,
        lambda node: _hardware(node, capabilities),
    )
    return [*problems, *_boundary(graph), *_collect(_typed(graph), checks)]


def default_capabilities(graph: Graph) -> list[int]:
    """Those of `RTX_DEFAULT` that have every data type of the graph."""
    typed = _typed(graph)
    return [sm for sm in RTX_DEFAULT if not any(any(_hardware(node, [sm])) for node in _nodes(typed))]


def label(node: Node) -> str:
    """How messages name a node: "node 'a/b' (my.domain::Foo)"."""
    operator = f"{node.domain}::{node.op}" if node.domain and node.domain != "ai.onnx" else node.op
    return f"node '{node.name}' ({operator})"


def _typed(graph: Graph) -> Graph:
    typed = copy_graph(graph)
    infer_shapes(typed)
    return typed


def _nodes(graph: Graph) -> Iterator[Node]:
    for scope in scopes(graph):
        yield from scope.nodes


def _collect(graph: Graph, checks: Sequence[Check]) -> Iterator[str]:
    """One line for each distinct problem: the first node that has it, and how many more do."""
    found: dict[str, list[Node]] = {}
    for node in _nodes(graph):
        for check in checks:
            for text in check(node):
                found.setdefault(text, []).append(node)
    for text, nodes in found.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        yield f"{label(nodes[0])}{more}: {text}"


def _boundary(graph: Graph) -> Iterator[str]:
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for tensor in tensors:
            dtype = onnx_dtype(tensor)
            if dtype == TensorProto.DOUBLE:
                yield (
                    f"{kind} '{tensor.name}' is float64, which TensorRT narrows to float32 without a word: "
                    "make it float32, with a Cast inside the graph"
                )
            elif dtype not in _TYPES:
                yield f"{kind} '{tensor.name}' is {_type_name(dtype)}, a type that TensorRT does not have"


def _operator(node: Node, missing: Set[str]) -> Iterator[str]:
    if _is_standard(node) or (node.domain == _TENSORRT_DOMAIN and node.op.startswith("TRT_")):
        if node.op in missing:
            yield "TensorRT has no such operator: rewrite it in operators that it has"
    elif onnx.defs.has(node.op):
        yield f"TensorRT ignores domains, and would build the standard {node.op} in its place: rename the operator"
    elif node.domain == "com.microsoft":
        yield "TensorRT has no such operator, which is ONNX Runtime's own: export without ONNX Runtime's fusions"
    else:
        yield "TensorRT has no such operator: rewrite it in standard ONNX operators"


def _is_standard(node: Node) -> bool:
    return node.domain in (None, "", "ai.onnx")


def _attention(node: Node) -> Iterator[str]:
    if node.op != "Attention" or not _is_standard(node):
        return
    given = [bool(tensor.name) or isinstance(tensor, Constant) for tensor in node.inputs] + [False] * 7
    if given[4] or given[5]:
        yield "TensorRT takes no past_key and past_value: keep the cache with TensorScatter, outside the operator"
    if given[6]:
        yield "TensorRT drops nonpad_kv_seqlen without a word: put the lengths into attn_mask"
    if any(tensor.name for tensor in node.outputs[1:]):
        yield "TensorRT gives no output but the first (no present_key, present_value or qk_matmul_output)"
    if node.attrs.get("softcap", 0.0):
        yield "TensorRT takes no softcap: write the attention in MatMul, Tanh and Softmax"
    if "softmax_precision" in node.attrs:
        yield "TensorRT takes no softmax_precision: drop the attribute"
    mask_types = {TensorProto.BOOL, TensorProto.UNDEFINED, onnx_dtype(node.inputs[0])}
    if given[3] and onnx_dtype(node.inputs[3]) not in mask_types:
        yield "TensorRT wants attn_mask in the type of Q, or bool: add a Cast"


def _cache(node: Node) -> Iterator[str]:
    if node.op == "TensorScatter" and _is_standard(node) and onnx_dtype(node.inputs[0]) not in _CACHED:
        yield (
            f"TensorRT's TensorScatter takes no {_type_name(onnx_dtype(node.inputs[0]))}: write an int8 cache with "
            "ScatterElements, as quantize-kv-cache does where it stands behind scatter-kv-cache"
        )


def _zero_point(node: Node) -> Iterator[str]:
    if node.op not in ("QuantizeLinear", "DequantizeLinear") or not _is_standard(node):
        return
    zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if node.op == "DequantizeLinear":
        dtype = onnx_dtype(node.inputs[0])
    elif zero is not None:
        dtype = onnx_dtype(zero)
    else:
        dtype = node.attrs.get("output_dtype", TensorProto.UNDEFINED) or TensorProto.UINT8
        if dtype == TensorProto.UINT8:
            yield "no zero point means uint8 in ONNX, and TensorRT would build it as int8: add an int8 zero point of 0"
            return
    if dtype not in _QUANTIZED | {TensorProto.UNDEFINED}:
        yield f"TensorRT does not quantize to {_type_name(dtype)}: quantize symmetrically to int8"
    elif isinstance(zero, Constant) and zero.values.astype("float32").any():
        yield "TensorRT takes zero points of 0 only: quantize symmetrically"
    elif zero is not None and not isinstance(zero, Constant):
        yield "the zero point is computed at run time; TensorRT takes a constant 0 only"


def _blocks(node: Node) -> Iterator[str]:
    """TensorRT takes the size of blocks from the number of scales, and does not look at `block_size`."""
    size = node.attrs.get("block_size", 0)
    if not size or node.op not in ("QuantizeLinear", "DequantizeLinear") or not _is_standard(node):
        return
    values, scales = (shape_of(tensor) for tensor in node.inputs[:2])
    if not values or not scales or len(values) != len(scales):
        return
    axis = node.attrs.get("axis", 1)
    depth, count = values[axis], scales[axis]
    if isinstance(depth, int) and isinstance(count, int) and depth != count * size:
        yield f"blocks of {size} do not divide an axis of {depth}, and TensorRT would take others: choose another size"


def _types(node: Node) -> Iterator[str]:
    for tensor in _tensors(node):
        dtype = onnx_dtype(tensor)
        if dtype not in _TYPES:
            yield f"uses {_type_name(dtype)}, a type that TensorRT does not have"
            return


def _hardware(node: Node, capabilities: Sequence[int]) -> Iterator[str]:
    for dtype in dict.fromkeys(onnx_dtype(tensor) for tensor in _tensors(node)):
        able = _CAPABILITIES_OF.get(dtype, RTX_CAPABILITIES)
        unable = [sm for sm in capabilities if sm not in able]
        if unable:
            yield f"uses {_type_name(dtype)}, which {_names(unable)} cannot run; {_names(able)} can"
    if node.op in _PRODUCTS and onnx_dtype(node.inputs[0]) == TensorProto.FLOAT:
        unable = [sm for sm in capabilities if sm in _WITHOUT_FP32_PRODUCT]
        if unable:
            yield f"is a float32 matrix product, which {_names(unable)} cannot run: convert the model to float16"


def _tensors(node: Node) -> Iterator[Tensor]:
    yield from node.inputs
    yield from node.outputs


def _names(capabilities: Sequence[int]) -> str:
    return ", ".join(f"SM{sm}" for sm in capabilities)


def _type_name(dtype: int) -> str:
    return "string" if dtype == TensorProto.STRING else dtype_name(dtype)
