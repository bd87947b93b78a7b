"""FLOPs of one run: the multiplications and additions of products (a multiply and an add count as two).

Counted are the operators whose cost is that of a matrix product: MatMul, Gemm, Conv, ConvTranspose, Einsum,
Attention, recurrent layers and their integer forms. Biases and elementwise operators are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from llmc.passes.base import Context, Skip
from llmc.passes.graph import DOMAIN, Graph, Node, Tensor, copy_graph, infer_shapes, scopes, shape_of
from llmc.passes.shapes.dimension import size_at
from llmc.passes.simplify.fold_constants import FoldConstants

Sizes = Mapping[str, int]


class _UnknownShapeError(Exception):
    """A shape that the count needs is not known."""


def count_flops(graph: Graph, sizes: Sizes) -> tuple[int | None, int]:
    """FLOPs with symbolic dimensions at `sizes`, and how many products they leave out.

    Left out are products of unknown shape, and those in branches and loops, which run an unknown number of times.
    The count is None where there are products and none of them could be counted.
    """
    sized = _at_sizes(graph, sizes)
    infer_shapes(sized)
    counts = _counts(sized)
    if None in counts:
        _fold_shape_arithmetic(sized)
        counts = _counts(sized)
    counted = [count for count in counts if count is not None]
    uncounted = len(counts) - len(counted) + _products_in_subgraphs(sized)
    return (None if uncounted and not counted else sum(counted)), uncounted


def _at_sizes(graph: Graph, sizes: Sizes) -> Graph:
    sized = copy_graph(graph)
    for tensor in (*sized.inputs, *sized.outputs, *(t for node in sized.nodes for t in node.outputs)):
        shape = shape_of(tensor)
        if shape is not None:
            tensor.shape = [_size(size, sizes) for size in shape]
    return sized


def _size(size: int | str | None, sizes: Sizes) -> int | str | None:
    try:
        return None if size is None else size_at(size, sizes)
    except KeyError:
        return size


def _fold_shape_arithmetic(graph: Graph) -> None:
    """At fixed sizes what is computed from shapes is constant, and the shapes that follow from it are known."""
    try:
        FoldConstants().run(graph, Context())
    except Skip:
        return
    infer_shapes(graph)


def _counts(graph: Graph) -> list[int | None]:
    return [_flops(node) for node in graph.nodes if _is_product(node)]


def _products_in_subgraphs(graph: Graph) -> int:
    return sum(_is_product(node) for inner in scopes(graph)[1:] for node in inner.nodes)


def _is_product(node: Node) -> bool:
    return node.op in _FORMULAS and node.domain in (None, "", "ai.onnx", DOMAIN)


def _flops(node: Node) -> int | None:
    try:
        return _FORMULAS[node.op](node)
    except _UnknownShapeError:
        return None


def _dims(tensor: Tensor) -> tuple[int, ...]:
    shape = shape_of(tensor)
    if shape is None or not all(isinstance(size, int) for size in shape):
        raise _UnknownShapeError
    return tuple(size for size in shape if isinstance(size, int))


def _matmul(node: Node) -> int:
    return 2 * prod(_dims(node.outputs[0])) * _dims(node.inputs[0])[-1]


def _gemm(node: Node) -> int:
    return 2 * prod(_dims(node.outputs[0])) * _dims(node.inputs[0])[0 if node.attrs.get("transA") else 1]


def _conv(node: Node) -> int:
    """Each output element sums over its group's channels and the kernel: weights are (out, in / group, *kernel)."""
    weights = node.inputs[3 if node.op == "QLinearConv" else 1]
    return 2 * prod(_dims(node.outputs[0])) * prod(_dims(weights)[1:])


def _conv_transpose(node: Node) -> int:
    """Each input element is spread over the kernel and its group's outputs: weights are (in, out / group, *kernel)."""
    return 2 * prod(_dims(node.inputs[0])) * prod(_dims(node.inputs[1])[1:])


def _attention(node: Node) -> int:
    """Query times key, then probabilities times value; a causal mask saves nothing (ONNX Attention-23)."""
    query, key, value = (_dims(tensor) for tensor in node.inputs[:3])
    past = _dims(node.inputs[4])[2] if len(node.inputs) > 4 and node.inputs[4].name else 0
    if len(query) == 4:
        batch, heads, length, query_width, value_width = *query, value[3]
        return 2 * batch * heads * length * (key[2] + past) * (query_width + value_width)
    batch, length, query_width = query
    value_width = value[2] // int(node.attrs["kv_num_heads"]) * int(node.attrs["q_num_heads"])
    return 2 * batch * length * (key[1] + past) * (query_width + value_width)


def _einsum(node: Node) -> int:
    """For every combination of indices a multiplication per further operand, and an addition where one is summed."""
    left, _, right = node.attrs["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, node.inputs, strict=True):
        dims = _dims(tensor)
        for label, size in zip(_labels(term, len(dims)), dims, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    kept = set(right) if "->" in node.attrs["equation"] else {label for label in left if left.count(label) == 1}
    summed = any(label.isalpha() and label not in kept for label in sizes)
    return (len(terms) - 1 + summed) * prod(sizes.values())


def _labels(term: str, rank: int) -> list[str]:
    """The index labels of one operand; the dimensions of an ellipsis are numbered from the right, as they broadcast."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(str(index) for index in reversed(range(hidden))), *after]


def _recurrent(node: Node) -> int:
    """Each step of each sequence multiplies the input and the state by all weights (directions, gates, width)."""
    steps_and_batch = _dims(node.inputs[0])[:2]
    return 2 * prod(steps_and_batch) * (prod(_dims(node.inputs[1])) + prod(_dims(node.inputs[2])))


_FORMULAS: dict[str, Callable[[Node], int]] = {
    "MatMul": _matmul,
    "CodebookMatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "QLinearMatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
