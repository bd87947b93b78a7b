"""What TensorRT would get wrong in silence is found in the graph, and what it gets right is left in peace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.targets.tensorrt_check import check_graph, default_capabilities
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.graph import Graph, save_model

RTX_MISSING = availability("tensorrt-rtx").missing


Make = Callable[..., Graph]


def problems(graph: Graph, capabilities: tuple[int, ...] = (), unsupported: frozenset[str] = frozenset()) -> list[str]:
    return check_graph(graph, "tensorrt-rtx", capabilities, unsupported)


def attention(make: Make, node: str, more: str = "", out: str = "", opset: int = 23) -> Graph:
    qkv = ", ".join(f"float16[2,4,8,16] {name}" for name in "qkv")
    return make(f"({qkv}{more}) => (float16[2,4,8,16] y{out}) {{ {node} }}", opset)


def quantized(make: Make, node: str, **constants: Any) -> Graph:
    return make(f"(float[4,8] x) => (float[4,8] y) {{ {node} }}", 21, s=np.float32(0.1), **constants)


GOOD: dict[str, Callable[[Make], Graph]] = {
    "standard operators": lambda make: make("(float[4,8] x) => (float[4,8] y) { y = Relu(x) }"),
    "attention": lambda make: attention(make, "y = Attention(q, k, v)"),
    "attention with its own mask type": lambda make: attention(make, "y = Attention(q, k, v, m)", ", float16[8,8] m"),
    "attention with a bool mask": lambda make: attention(make, "y = Attention(q, k, v, m)", ", bool[8,8] m"),
    "int8 with zero points of 0": lambda make: quantized(
        make, "q = QuantizeLinear(x, s, z8) y = DequantizeLinear(q, s, z8)", z8=np.int8(0)
    ),
    "int8 by output_dtype": lambda make: quantized(
        make,
        "q = QuantizeLinear <output_dtype = 3> (x, s) y = DequantizeLinear(q, s)",
    ),
    "TensorRT's own operator": lambda make: make(
        "(float[4,8] x) => (float[4,8] y) { y = trt.TRT_INT4QuantizeLinear(x) }"
    ),
}

BAD: dict[str, tuple[Callable[[Make], Graph], str]] = {
    "no nodes": (
        lambda make: make("(float[4,8] x) => (float[4,8] x) { }"),
        "the graph is empty: it has no nodes, or no outputs",
    ),
    "old opset": (
        lambda make: make("(float[4,8] x) => (float[4,8] y) { y = Relu(x) }", opset=8),
        "the graph is of opset 8; TensorRT-RTX reads 9 to 25: convert it",
    ),
    "new opset": (
        lambda make: make("(float[4,8] x) => (float[4,8] y) { y = Relu(x) }", opset=26),
        "the graph is of opset 26; TensorRT-RTX reads 9 to 25: convert it",
    ),
    "another domain's Relu": (
        lambda make: make("(float[4,8] x) => (float[4,8] y) { [r] y = my.domain.Relu(x) }"),
        "node 'r' (my.domain::Relu): TensorRT ignores domains, and would build the standard Relu in its place: "
        "rename the operator",
    ),
    "ONNX Runtime's operators": (
        lambda make: make("(float[4,8] x) => (float[4,8] y) { [b] y = com.microsoft.BiasGelu(x, x) }"),
        "node 'b' (com.microsoft::BiasGelu): TensorRT has no such operator, which is ONNX Runtime's own: "
        "export without ONNX Runtime's fusions",
    ),
    "unknown operator, twice, unnamed": (
        lambda make: make("(float[4,8] x) => (float[4,8] y) { z = my.domain.Foo(x) y = my.domain.Foo(z) }"),
        "node 'z' (my.domain::Foo) and 1 more: TensorRT has no such operator: rewrite it in standard ONNX operators",
    ),
    "an operator without a kernel": (
        lambda make: make("(float[4,8] x) => (int64[2,n] y) { [n] y = NonZero(x) }"),
        "node 'n' (NonZero): TensorRT has no such operator: rewrite it in operators that it has",
    ),
    "inside a subgraph": (
        lambda make: make(
            "(bool c, float[4] x) => (float[4] y) { y = If (c) <then_branch = t () => (float[4] a) "
            "{ [r] a = my.domain.Foo(x) }, else_branch = e () => (float[4] b) { b = Relu(x) }> }"
        ),
        "node 'r' (my.domain::Foo): TensorRT has no such operator: rewrite it in standard ONNX operators",
    ),
    "past keys": (
        lambda make: attention(
            make, "[a] y = Attention(q, k, v, , pk, pv)", ", float16[2,4,6,16] pk, float16[2,4,6,16] pv"
        ),
        "node 'a' (Attention): TensorRT takes no past_key and past_value: keep the cache with TensorScatter, "
        "outside the operator",
    ),
    "present keys": (
        lambda make: attention(
            make, "[a] y, p, r = Attention(q, k, v)", out=", float16[2,4,8,16] p, float16[2,4,8,16] r"
        ),
        "node 'a' (Attention): TensorRT gives no output but the first (no present_key, present_value or "
        "qk_matmul_output)",
    ),
    "a cache of int8": (
        lambda make: make(
            "(int8[2,4,8,16] c, int8[2,4,1,16] n, int64[2] at) => (int8[2,4,8,16] y) "
            "{ [t] y = TensorScatter <axis = 2> (c, n, at) }",
            opset=24,
        ),
        "node 't' (TensorScatter): TensorRT's TensorScatter takes no int8: write an int8 cache with ScatterElements, "
        "as quantize-kv-cache does where it stands behind scatter-kv-cache",
    ),
    "nonpad_kv_seqlen": (
        lambda make: attention(make, "[a] y = Attention(q, k, v, , , , n)", ", int64[2] n", opset=24),
        "node 'a' (Attention): TensorRT drops nonpad_kv_seqlen without a word: put the lengths into attn_mask",
    ),
    "softcap": (
        lambda make: attention(make, "[a] y = Attention <softcap = 30.0> (q, k, v)"),
        "node 'a' (Attention): TensorRT takes no softcap: write the attention in MatMul, Tanh and Softmax",
    ),
    "softmax_precision": (
        lambda make: attention(make, "[a] y = Attention <softmax_precision = 1> (q, k, v)"),
        "node 'a' (Attention): TensorRT takes no softmax_precision: drop the attribute",
    ),
    "mask of another type": (
        lambda make: attention(make, "[a] y = Attention(q, k, v, m)", ", float[8,8] m"),
        "node 'a' (Attention): TensorRT wants attn_mask in the type of Q, or bool: add a Cast",
    ),
    "no zero point": (
        lambda make: quantized(make, "[q] q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)"),
        "node 'q' (QuantizeLinear): no zero point means uint8 in ONNX, and TensorRT would build it as int8: "
        "add an int8 zero point of 0",
    ),
    "a last block that is not whole": (
        lambda make: make(
            "(float[100,8] x) => (float[100,8] y)"
            "{ [d] w = DequantizeLinear <axis = 0, block_size = 32> (l, s) y = Add(x, w) }",
            21,
            l=np.ones((100, 8), ml_dtypes.int4),
            s=np.ones((4, 8), np.float32),
        ),
        "node 'd' (DequantizeLinear): blocks of 32 do not divide an axis of 100, and TensorRT would take others: "
        "choose another size",
    ),
    "zero point of 5": (
        lambda make: quantized(make, "[q] q = QuantizeLinear(x, s, z8) y = Cast<to=1>(q)", z8=np.int8(5)),
        "node 'q' (QuantizeLinear): TensorRT takes zero points of 0 only: quantize symmetrically",
    ),
    "uint8": (
        lambda make: quantized(make, "[q] q = QuantizeLinear(x, s, zu) y = Cast<to=1>(q)", zu=np.uint8(0)),
        "node 'q' (QuantizeLinear): TensorRT does not quantize to uint8: quantize symmetrically to int8",
    ),
    "uint8 weights": (
        lambda make: quantized(make, "[d] w = DequantizeLinear(wu, s) y = Add(x, w)", wu=np.ones(8, np.uint8)),
        "node 'd' (DequantizeLinear): TensorRT does not quantize to uint8: quantize symmetrically to int8",
    ),
    "zero point from an input": (
        lambda make: make("(float[4,8] x, float s, int8 z) => (int8[4,8] y) { [q] y = QuantizeLinear(x, s, z) }"),
        "node 'q' (QuantizeLinear): the zero point is computed at run time; TensorRT takes a constant 0 only",
    ),
    "uint4 weights": (
        lambda make: make(
            "(float[4,8] x) => (float[4,8] y) { [d] f = Cast<to=1>(w) y = Add(x, f) }",
            w=np.ones(8, ml_dtypes.uint4),
        ),
        "node 'd' (Cast): uses uint4, a type that TensorRT does not have",
    ),
    "float8 of five exponent bits": (
        lambda make: make("(float[4,8] x) => (float[4,8] y) { [c] z = Cast<to=19>(x) [d] y = Cast<to=1>(z) }"),
        "node 'c' (Cast) and 1 more: uses float8_e5m2, a type that TensorRT does not have",
    ),
    "float64 input": (
        lambda make: make("(double[4,8] x) => (float[4,8] y) { y = Cast<to=1>(x) }"),
        "input 'x' is float64, which TensorRT narrows to float32 without a word: make it float32, with a Cast inside "
        "the graph",
    ),
    "int16 output": (
        lambda make: make("(float[4,8] x) => (int16[4,8] y) { [c] y = Cast<to=5>(x) }"),
        "output 'y' is int16, a type that TensorRT does not have",
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_leaves_alone(name: str, graph_of: Make) -> None:
    assert problems(GOOD[name](graph_of)) == []


@pytest.mark.parametrize("name", BAD)
def test_finds(name: str, graph_of: Make) -> None:
    make, problem = BAD[name]
    assert problem in problems(make(graph_of))


def test_finds_what_the_parser_has_no_importer_for(graph_of: Make) -> None:
    graph = graph_of("(float[4,4] x) => (float y) { [d] y = Det(x) }")
    assert problems(graph) == []
    assert problems(graph, unsupported=frozenset({"Det"})) == [
        "node 'd' (Det): TensorRT has no such operator: rewrite it in operators that it has"
    ]


def test_full_tensorrt_has_what_rtx_lacks(graph_of: Make) -> None:
    graph = graph_of("(float[4,8] x) => (int64[2,n] y) { [n] y = NonZero(x) }")
    assert check_graph(graph, "tensorrt", (), set()) == []


def product(make: Make, kind: str) -> Graph:
    """A matrix product in the type `kind`; quantized ones come from DequantizeLinear to float16, or as `kind` says."""
    if kind in ("float", "float16", "bfloat16"):
        return make(f"({kind}[8,64] x, {kind}[64,64] w) => ({kind}[8,64] y) {{ [mm] y = MatMul(x, w) }}")
    wide = "float" if kind == "int8 to float" else "float16"
    scale = np.float32(0.1) if wide == "float" else np.float16(0.1)
    text = f"({wide}[8,64] x) => ({wide}[8,64] y)"
    if kind == "int4":
        node = "[d] v = DequantizeLinear<axis = 0, block_size = 32>(w, s) [mm] y = MatMul(x, v)"
        return make(f"{text} {{ {node} }}", s=np.full((2, 64), scale), w=np.ones((64, 64), ml_dtypes.int4))
    dtype = ml_dtypes.float8_e4m3fn if kind == "float8" else np.int8
    node = "[q] q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, z)"
    return make(
        f"{text} {{ {node} [mm] y = MatMul(a, v) }}", s=scale, z=np.zeros((), dtype), w=np.ones((64, 64), dtype)
    )


PRODUCTS = ("float", "float16", "bfloat16", "int8", "int8 to float", "float8", "int4")
BUILD_ALL = """
import json, sys
from pathlib import Path
from llmc.compiler.targets.tensorrt_worker import RefusedError, build
Path(sys.argv[2]).touch()
verdicts = []
for model, sm in json.loads(sys.argv[1]):
    job = {"kind": "tensorrt-rtx", "model": model, "engine": sys.argv[2], "profiles": [],
           "compute_capabilities": [sm], "workspace": None, "plugins": []}
    try:
        build(job, lambda phase: None)
        verdicts.append(True)
    except RefusedError:
        verdicts.append(False)
print("verdicts", json.dumps(verdicts))
"""


@pytest.mark.skipif(bool(RTX_MISSING), reason=RTX_MISSING)
def test_the_table_of_types_and_capabilities_is_what_the_builder_says(tmp_path: Path, graph_of: Make) -> None:
    cases = [(dtype, sm) for dtype in PRODUCTS for sm in (75, 86, 89, 120)]
    for dtype in PRODUCTS:
        save_model(product(graph_of, dtype), tmp_path / f"{dtype}.onnx")
    jobs = json.dumps([(str(tmp_path / f"{dtype}.onnx"), sm) for dtype, sm in cases])
    ran = subprocess.run(
        [sys.executable, "-P", "-c", BUILD_ALL, jobs, str(tmp_path / "engine")],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("verdicts "))
    built = dict(zip(cases, json.loads(line.removeprefix("verdicts ")), strict=True))
    allowed = {(dtype, sm): not problems(product(graph_of, dtype), (sm,)) for dtype, sm in cases}
    assert allowed == built
    assert not built["float", 75]
    assert not built["float8", 86]


@pytest.mark.parametrize(
    ("dtype", "capabilities", "problem"),
    [
        (
            "float",
            (75, 80),
            "node 'mm' (MatMul): is a float32 matrix product, which SM75 cannot run: convert the model to float16",
        ),
        (
            "bfloat16",
            (75, 80),
            "node 'mm' (MatMul): uses bfloat16, which SM75 cannot run; SM80, SM86, SM89, SM120, SM121 can",
        ),
        (
            "int4",
            (75, 80),
            "node 'd' (DequantizeLinear): uses int4, which SM75 cannot run; SM80, SM86, SM89, SM120, SM121 can",
        ),
        (
            "float8",
            (80, 86, 89),
            "node 'q' (QuantizeLinear) and 2 more: uses float8_e4m3fn, which SM80, SM86 cannot run; "
            "SM89, SM120, SM121 can",
        ),
    ],
)
def test_names_the_node_the_type_and_the_capabilities(
    dtype: str, capabilities: tuple[int, ...], problem: str, graph_of: Make
) -> None:
    assert problems(product(graph_of, dtype), capabilities) == [problem]


@pytest.mark.parametrize(
    ("dtype", "capabilities"), [("float16", [80, 86, 89, 120]), ("float", [80, 86, 89, 120]), ("float8", [89, 120])]
)
def test_the_default_leaves_out_what_the_types_do_not_run_on(
    dtype: str, capabilities: list[int], graph_of: Make
) -> None:
    assert default_capabilities(product(graph_of, dtype)) == capabilities
