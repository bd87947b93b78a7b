from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.split_packed import SplitPacked
from llmc.passes.graph import Graph, copy_graph, from_model, infer_shapes, to_model

PICK = (
    "i0 = Constant<value = int64 {0}>() i1 = Constant<value = int64 {1}>() i2 = Constant<value = int64 {-1}>() "
    "a = Gather(t, i0) b = Gather(t, i1) c = Gather(t, i2)"
)
STACK = "h = Constant<value_ints = [0, 0, 3, 4]>() r = Reshape(x, h) "
TORCH = (
    f"{STACK} e0 = Constant<value_ints = [0]>() e3 = Constant<value_ints = [3]>() u = Unsqueeze(r, e0) "
    f"v = Transpose<perm = [3, 1, 2, 0, 4]>(u) t = Squeeze(v, e3) {PICK}"
)
OUTPUTS = "float[S,B,4] a, float[S,B,4] b, float[S,B,4] c"
SWAPPED, HEADS = OUTPUTS.replace("S,B,4", "B,S,4"), OUTPUTS.replace("S,B,4", "S,2,B,2")
PRODUCT = "p = MatMul(y, w) x = Add(bias, p) "
LAST = (
    "j0 = Constant<value_ints = [0]>() j1 = Constant<value_ints = [2]>() j2 = Constant<value_ints = [4]>() "
    "j3 = Constant<value_ints = [9223372036854775807]>() e3 = Constant<value_ints = [3]>() "
    "a = Slice(t, j0, j1, e3) b = Slice(t, j1, j2, e3) c = Slice(t, j2, j3, e3)"
)
NEOX = "h = Constant<value_ints = [0, 0, 2, 6]>() r = Reshape(x, h) t = Transpose<perm = [0, 2, 1, 3]>(r) "
BLOOM = "h = Constant<value_ints = [0, 0, 2, 3, 2]>() r = Reshape(x, h) "
FIRES = {
    "as torch.nn.MultiheadAttention does": (TORCH, OUTPUTS, {"Split": 1}),
    "with one Transpose": (f"{STACK} t = Transpose<perm = [2, 0, 1, 3]>(r) {PICK}", OUTPUTS, {"Split": 1}),
    "where it stands": (
        f"{STACK} t = Identity(r) {PICK.replace('Gather(', 'Gather<axis = 2>(')}", OUTPUTS, {"Split": 1},
    ),
    "parts in another order": (
        TORCH.replace("a = Gather(t, i0) b = Gather(t, i1)", "b = Gather(t, i1) a = Gather(t, i0)"),
        OUTPUTS, {"Split": 1},
    ),
    "parts turned around": (
        f"{STACK} t = Transpose<perm = [2, 1, 0, 3]>(r) {PICK}", SWAPPED, {"Split": 1, "Transpose": 3},
    ),
    "heads as in timm": (
        f"h = Constant<value_ints = [0, 0, 3, 2, 2]>() r = Reshape(x, h) "
        f"t = Transpose<perm = [2, 0, 3, 1, 4]>(r) {PICK}", HEADS, {"Split": 1, "Reshape": 3, "Transpose": 3},
    ),
    "GPT-NeoX": (
        PRODUCT + NEOX + LAST, HEADS, {"MatMul": 1, "Add": 1, "Split": 1, "Reshape": 3, "Transpose": 3},
    ),
    "GPT-NeoX through dynamo": (
        f"{PRODUCT}{NEOX} n = Constant<value_ints = [2, 2, 2]>() a, b, c = Split<axis = 3>(t, n)", HEADS,
        {"MatMul": 1, "Add": 1, "Split": 1, "Reshape": 3, "Transpose": 3},
    ),
    "BLOOM": (
        PRODUCT + BLOOM + PICK.replace("Gather(t", "Gather<axis = 3>(r"), OUTPUTS.replace("4]", "2,2]"),
        {"MatMul": 1, "Add": 1, "Split": 1, "Reshape": 3},
    ),
    "columns of a product alone": (
        "x = MatMul(y, w) " + NEOX + LAST, HEADS, {"MatMul": 1, "Split": 1, "Reshape": 3, "Transpose": 3},
    ),
    "sizes of groups": (
        f"{PRODUCT} h = Constant<value_ints = [0, 0, 1, 6, 2]>() r = Reshape(x, h) j0 = Constant<value_ints = [0]>() "
        "j1 = Constant<value_ints = [4]>() i1 = Constant<value_ints = [-2]>() i2 = Constant<value_ints = [-1]>() "
        "e3 = Constant<value_ints = [3]>() q = Slice(r, j0, j1, e3) f = Constant<value_ints = [0, 0, 8]>() "
        "a = Reshape(q, f) b = Gather<axis = 3>(r, i1) c = Gather<axis = 3>(r, i2)",
        "float[S,B,8] a, float[S,B,1,1,2] b, float[S,B,1,1,2] c",
        {"MatMul": 1, "Add": 1, "Split": 1, "Reshape": 2},
    ),
    "groups, some of whose parts are brought to the front first": (
        f"{PRODUCT} h = Constant<value_ints = [0, 0, 1, 6, 2]>() r = Reshape(x, h) j0 = Constant<value_ints = [0]>() "
        "j1 = Constant<value_ints = [4]>() e3 = Constant<value_ints = [3]>() q = Slice(r, j0, j1, e3) "
        "f = Constant<value_ints = [0, 0, 8]>() a = Reshape(q, f) t = Transpose<perm = [3, 0, 1, 2, 4]>(r) "
        "i1 = Constant<value = int64[1, 1] {-2}>() i2 = Constant<value = int64[1, 1] {5}>() "
        "bg = GatherND(t, i1) b = Transpose<perm = [1, 2, 3, 0, 4]>(bg) "
        "cg = GatherND(t, i2) c = Transpose<perm = [1, 2, 3, 0, 4]>(cg)",
        "float[S,B,8] a, float[S,B,1,1,2] b, float[S,B,1,1,2] c",
        {"MatMul": 1, "Add": 1, "Split": 1, "Reshape": 2},
    ),
}  # fmt: skip
STAYS = {
    "a part is taken twice": (
        TORCH.replace("Gather(t, i2)", "Gather(t, i1)"), OUTPUTS,
        ["of the columns of 'x' not each is taken once"],
    ),
    "along the width": (
        f"{STACK} t = Transpose<perm = [3, 0, 1, 2]>(r) {PICK}", OUTPUTS.replace("4", "3"),
        ["of the columns of 'x' not each is taken once"],
    ),
    "the stack is an output": (
        TORCH, f"{OUTPUTS}, float[3,S,B,4] t", ["'t', the parts side by side, is an output of the graph"],
    ),
    "the stack is used": (
        f"{STACK} t = Transpose<perm = [2, 0, 1, 3]>(r) {PICK} d = Relu(t)", f"{OUTPUTS}, float[3,S,B,4] d", [],
    ),
    "all of it is taken beside a part": (
        f"{STACK} t = Transpose<perm = [2, 0, 1, 3]>(r) {PICK} d = Transpose<perm = [1, 2, 0, 3]>(t)",
        f"{OUTPUTS}, float[S,B,3,4] d", ["of the columns of 'x' not each is taken once"],
    ),
    "several at once": (
        TORCH.replace("value = int64 {0}", "value = int64[1] {0}"), OUTPUTS.replace("float[S,B", "float[1,S,B", 1),
        ["the shape of a part would have to be computed in each run"],
    ),
    "part that the graph computes": (
        f"{STACK} s = Shape<start = 0, end = 1>(x) z = Squeeze(s) n = Constant<value = int64 {{1}}>() o = Mod(z, n) "
        f"t = Transpose<perm = [2, 0, 1, 3]>(r) {PICK.replace('a = Gather(t, i0)', '[g] a = Gather(t, o)')}", OUTPUTS,
        ["Gather 'g' takes not one part that is known"],
    ),
    "along the batch": (
        f"{STACK} i0 = Constant<value = int64 {{0}}>() [g] a = Gather(r, i0) b = Gather(r, i0)",
        "float[B,3,4] a, float[B,3,4] b", ["Gather 'g' takes not one part that is known"],
    ),
    "columns apart, of an input": (
        NEOX + LAST, HEADS,
        ["the columns of its parts do not stand together, and 'x' is made by no MatMul or Gemm"],
    ),
    "columns apart, product used": (
        f"[m] {PRODUCT}{NEOX}{LAST} d = Relu(p)", f"{HEADS}, float[S,B,12] d",
        ["the columns of its parts do not stand together, and what MatMul 'm' makes is used elsewhere too"],
    ),
    "columns apart, weight used": (
        f"[m] {PRODUCT}{NEOX}{LAST} d = MatMul(y, w)", f"{HEADS}, float[S,B,12] d",
        ["the columns of its parts do not stand together, and 'w' of MatMul 'm' is no constant for it alone"],
    ),
    "columns apart, bias of everything": (
        f"[m] {PRODUCT.replace('bias', 'wide')}{NEOX}{LAST}", HEADS,
        ["the columns of its parts do not stand together, and 'wide' of MatMul 'm' is no constant for it alone"],
    ),
}  # fmt: skip


def build(parse: Any, body: str, outputs: str, opset: int = 20) -> Graph:
    """x [S, B, 12], or made of y [S, B, 6] by a product with a weight and a bias."""
    source = (
        "float[S,B,6] y, float[6,12] w, float[12] bias, float[1,1,12] wide" if "y, w" in body else "float[S,B,12] x"
    )
    graph: Graph = parse(f"({source}) => ({outputs}) {{ {body} }}", opset=opset)
    rng = np.random.default_rng(0)
    for tensor in [t for t in graph.inputs if t.name in ("w", "bias", "wide")]:
        tensor.to_constant(rng.standard_normal(tensor.shape).astype(np.float32))
    graph.inputs = [t for t in graph.inputs if t.name in ("x", "y")]
    infer_shapes(graph)
    return graph


def compare(graph: Graph, changed: Graph) -> None:
    """Equal where nothing is multiplied; else sums of six products, rounded in any order: 6 · 2^-24 of about 10."""
    onnx.checker.check_model(to_model(changed), full_check=True)
    tolerance = 6 * 2.0**-24 * 10 if any(node.op in ("MatMul", "Gemm") for node in graph.nodes) else 0.0
    for seed, (sequence, batch) in enumerate(((5, 2), (1, 3))):
        (x,) = graph.inputs
        feeds = {x.name: np.random.default_rng(seed).standard_normal((sequence, batch, x.shape[-1])).astype(np.float32)}
        found = Session(changed).run(feeds)
        for output, expected in Session(graph).run(feeds).items():
            np.testing.assert_allclose(found[output], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FIRES)
@pytest.mark.parametrize("opset", [13, 20])
def test_fires(name: str, opset: int, parse: Any) -> None:
    body, outputs, operators = FIRES[name]
    graph = build(parse, body, outputs, opset)
    changed = copy_graph(graph)
    result = SplitPacked().run(changed, Context())
    assert [rewrite.detail[:7] for rewrite in result.rewrites] == ["3 parts"], result.near_misses
    assert Counter(node.op for node in changed.nodes) == operators
    compare(graph, changed)


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str, parse: Any) -> None:
    body, outputs, reasons = STAYS[name]
    graph = build(parse, body, outputs)
    result = SplitPacked().run(graph, Context())
    assert result.rewrites == []
    assert [miss.reason for miss in result.near_misses] == reasons


def test_gemm_with_its_weight_transposed(parse: Any) -> None:
    body = (
        "x = Gemm<transB = 1>(y, w, bias) h = Constant<value_ints = [0, 2, 3, 2]>() r = Reshape(x, h) "
        + PICK.replace("Gather(t", "Gather<axis = 2>(r")
    )
    outputs = "float[S,2,2] a, float[S,2,2] b, float[S,2,2] c"
    graph: Graph = parse(f"(float[S,6] y, float[12,6] w, float[12] bias) => ({outputs}) {{ {body} }}")
    rng = np.random.default_rng(0)
    for tensor in graph.inputs[1:]:
        tensor.to_constant(rng.standard_normal(tensor.shape).astype(np.float32))
    graph.inputs = graph.inputs[:1]
    infer_shapes(graph)
    changed = copy_graph(graph)
    SplitPacked().run(changed, Context())
    assert Counter(node.op for node in changed.nodes) == {"Gemm": 1, "Split": 1, "Reshape": 3}
    y = rng.standard_normal((5, 6)).astype(np.float32)
    found = Session(changed).run({"y": y})
    for output, expected in Session(graph).run({"y": y}).items():
        np.testing.assert_allclose(found[output], expected, rtol=0, atol=6 * 2.0**-24 * 10)  # as in compare()


def test_sequence_first_is_transposed_before_the_product(parse: Any) -> None:
    """torch.nn.MultiheadAttention merges batch and heads between its Transposes."""
    merged = "n = Constant<value_ints = [4, 4, 4]>() ax, bx, cx = Split<axis = 2>(x, n) "
    merged += "m = Constant<value_ints = [0, -1, 2]>() g = Constant<value_ints = [-1, 2, 5, 2]>() "
    for part in "abc":
        merged += f"{part}m = Reshape({part}x, m) {part}t = Transpose<perm = [1, 0, 2]>({part}m) "
        merged += f"{part} = Reshape({part}t, g) "
    graph: Graph = parse(f"(float[5,B,12] x) => (float[B,2,5,2] a, float[B,2,5,2] b, float[B,2,5,2] c) {{ {merged} }}")
    infer_shapes(graph)
    changed = copy_graph(graph)
    result = SplitPacked().run(changed, Context())
    assert len(result.rewrites) == 3, result.near_misses
    assert Counter(node.op for node in changed.nodes) == {"Split": 1, "Reshape": 3, "Transpose": 3}
    onnx.checker.check_model(to_model(changed), full_check=True)
    x = np.random.default_rng(0).standard_normal((5, 3, 12)).astype(np.float32)
    found = Session(changed).run({"x": x})
    for output, expected in Session(graph).run({"x": x}).items():
        np.testing.assert_array_equal(found[output], expected)


@st.composite
def chains(draw: st.DrawFn) -> onnx.ModelProto:
    """A product of 24 columns, given axes of their own, moved, taken apart along one, and put together again."""
    factors = draw(st.permutations(draw(st.sampled_from([[2, 3, 4], [2, 12], [3, 8], [2, 2, 6], [1, 4, 6]]))))
    sizes: list[Any] = ["S", "B", *factors]
    helper, nodes = onnx.helper, []
    weights = {"w": np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)}

    def view(target: list[int], source: str, name: str) -> None:
        weights[f"{name}_to"] = np.array(target, np.int64)
        nodes.append(helper.make_node("Reshape", [source, f"{name}_to"], [name]))

    nodes.append(helper.make_node("MatMul", ["y", "w"], ["x"]))
    view([0, 0, *factors], "x", "r")
    perm = draw(st.permutations(range(len(sizes))))
    nodes.append(helper.make_node("Transpose", ["r"], ["t"], perm=perm))
    sizes = [sizes[axis] for axis in perm]
    axis = draw(st.sampled_from([i for i, size in enumerate(sizes) if isinstance(size, int)]))
    count = sizes[axis]
    cuts = sorted(draw(st.sets(st.integers(1, max(count - 1, 1)), max_size=3)) - {count})
    widths = np.diff([0, *cuts, count]).tolist()
    names = [f"part{i}" for i in range(len(widths))]
    weights["widths"] = np.array(widths, np.int64)
    nodes.append(helper.make_node("Split", ["t", "widths"], names, axis=axis))
    outputs = []
    for name, width in zip(names, widths, strict=True):
        part: list[Any] = [*sizes[:axis], width, *sizes[axis + 1 :]]
        again = draw(st.permutations(range(len(part))))
        nodes.append(helper.make_node("Transpose", [name], [f"{name}_t"], perm=again))
        part = [part[i] for i in again]
        fixed = [i for i in range(len(part) - 1) if isinstance(part[i], int) or isinstance(part[i + 1], int)]
        first = draw(st.sampled_from(fixed))  # joined with the axis behind it
        symbols = [i for i, size in enumerate(part) if isinstance(size, str)]
        target = [
            0 if i in symbols and i < first else size if isinstance(size, int) else -1 for i, size in enumerate(part)
        ]
        joined = part[first : first + 2]
        target[first : first + 2] = [-1 if any(isinstance(n, str) for n in joined) else joined[0] * joined[1]]
        view(target, f"{name}_t", f"{name}_r")
        last = f"{name}_r" if target.count(-1) < 2 else f"{name}_t"
        if last == f"{name}_t":
            nodes.pop()
        outputs.append(helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["S", "B", 3])], outputs,
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@given(chains())
@settings(max_examples=50, deadline=None)
def test_any_chain_keeps_its_values(model: onnx.ModelProto) -> None:
    graph = from_model(model)
    infer_shapes(graph)
    changed = copy_graph(graph)
    SplitPacked().run(changed, Context())
    compare(graph, changed)
