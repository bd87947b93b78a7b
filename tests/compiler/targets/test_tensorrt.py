"""Engines that TensorRT-RTX really builds here, and what it refuses. None is run: that needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.errors import LlmcError, TargetError
from llmc.compiler.targets import BuildRequest, Built, Range, engine_header, gpu, tensorrt_process
from llmc.compiler.targets import tensorrt as tensorrt_module
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.graph import Graph, save_model

pytestmark = pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason=availability("tensorrt-rtx").missing)
TARGET = TensorRT("tensorrt-rtx")
DYNAMIC = {"batch": Range(1, 2, 4), "sequence": Range(1, 16, 32)}


Make = Callable[..., Graph]


def weights(*shape: int, dtype: Any = np.float16, seed: int = 0) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(dtype)


def build(graph: Graph, tmp_path: Path, request: BuildRequest, phases: list[str] | None = None) -> tuple[Built, bytes]:
    folder = tmp_path / "artifact"
    folder.mkdir(exist_ok=True)
    save_model(graph, tmp_path / "model.onnx")
    built = TARGET.build(tmp_path / "model.onnx", folder, request, (phases if phases is not None else []).append)
    assert [path.name for path in folder.iterdir()] == ["model.engine"]
    return built, (folder / "model.engine").read_bytes()


@pytest.fixture
def block(graph_of: Make) -> Graph:
    """LayerNormalization → product → Attention of two heads, in float16, with dynamic dimensions."""
    return graph_of(
        """(float16[batch,sequence,64] x, bool[batch,1,1,sequence] mask) => (float16[batch,sequence,64] y) {
        [norm] n = LayerNormalization(x, scale, bias)
        [project] q = MatMul(n, w)
        [attend] a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, n, n, mask)
        [add] y = Add(a, x) }""",
        scale=np.ones(64, np.float16),
        bias=np.zeros(64, np.float16),
        w=weights(64, 64),
    )


def test_a_transformer_block_becomes_an_engine_for_several_gpus(block: Graph, tmp_path: Path) -> None:
    request, phases = BuildRequest([DYNAMIC], (120, 80)), list[str]()
    assert TARGET.check(block, request) == []
    built, engine = build(block, tmp_path, request, phases)
    assert phases == ["loading TensorRT-RTX", "parsing model.onnx", "building for SM80, SM120", "checking the engine"]
    header = engine_header.read(built.files[0])
    assert header.compute_capabilities == (80, 120)
    assert header.version == TARGET.versions["tensorrt-rtx"] == built.facts["builder_version"]
    assert built.facts["engine_bytes"] == len(engine) == header.engine_bytes
    assert built.facts["compute_capabilities"] == [80, 120]
    assert built.facts["inputs"] == ["x float16[batch, sequence, 64]", "mask bool[batch, 1, 1, sequence]"]
    assert built.facts["outputs"] == ["y float16[batch, sequence, 64]"]
    assert built.facts["engine_layers_of"] == "SM80"
    assert (built.facts["attention_nodes"], built.facts["attention_nodes_decomposed"]) == (1, 0)
    # 64 * 64 + 2 * 64 parameters of two bytes; the builder pads each tensor.
    assert 2 * (64 * 64 + 2 * 64) <= int(str(built.facts["weights_bytes"])) < 20_000
    assert built.warnings == []


def test_layers_name_their_sources_and_types(block: Graph, tmp_path: Path) -> None:
    built, _ = build(block, tmp_path, BuildRequest([DYNAMIC], (89,)))
    assert built.facts["engine_layers"] == len(built.layers)
    assert {node for layer in built.layers for node in layer["nodes"]} >= {"norm", "project", "attend", "add"}  # type: ignore[attr-defined]
    (project,) = (layer for layer in built.layers if "project" in layer["nodes"] and layer["kind"] == "gemm")  # type: ignore[operator]
    assert (project["dtype"], project["inputs"], project["outputs"]) == ("float16", ["float16"], ["float16"])
    json.dumps([built.facts, built.layers])


def test_two_builds_are_the_same(block: Graph, tmp_path: Path) -> None:
    request = BuildRequest([DYNAMIC], (80, 89))
    first, engine = build(block, tmp_path, request)
    second, again = build(block, tmp_path, BuildRequest([DYNAMIC], (89, 80)))
    assert engine == again
    assert (first.facts, first.layers) == (second.facts, second.layers)


def test_attention_without_a_fused_kernel_is_decomposed_and_said(graph_of: Make, tmp_path: Path) -> None:
    qkv = ", ".join(f"float[2,4,8,16] {name}" for name in "qkv")
    graph = graph_of(f"({qkv}) => (float[2,4,8,16] y) {{ [attend] y = Attention(q, k, v) }}")
    built, _ = build(graph, tmp_path, BuildRequest([], (89,)))
    assert (built.facts["attention_nodes"], built.facts["attention_nodes_decomposed"]) == (1, 1)
    assert built.warnings == [
        "1 of 1 Attention nodes have no fused kernel and are computed in parts (first: 'attend'); "
        "float16 and head sizes of 16 to 256 have one"
    ]


def test_quantized_products_run_in_int8(graph_of: Make, tmp_path: Path) -> None:
    graph = graph_of(
        """(float16[8,64] x) => (float16[8,32] y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        v = DequantizeLinear <axis = 1> (w, ws, wz)
        [product] y = MatMul(d, v) }""",
        opset=21,
        s=np.float16(0.05),
        z=np.int8(0),
        w=np.random.default_rng(0).integers(-127, 128, (64, 32)).astype(np.int8),
        ws=np.full(32, 0.01, np.float16),
        wz=np.zeros(32, np.int8),
    )
    request = BuildRequest([], (75, 89))
    assert TARGET.check(graph, request) == []
    built, _ = build(graph, tmp_path, request)
    assert {layer["dtype"] for layer in built.layers if layer["kind"] == "gemm"} == {"int8"}


def test_a_convolution_for_the_default_gpus_from_external_data(graph_of: Make, tmp_path: Path) -> None:
    graph = graph_of(
        "(float16[1,8,16,16] x) => (float16[1,8,14,14] y) { [conv] c = Conv(x, w) y = Relu(c) }", w=weights(8, 8, 3, 3)
    )
    save_model(graph, tmp_path / "model.onnx", inline_below=0)
    assert (tmp_path / "model.onnx.data").stat().st_size == 8 * 8 * 3 * 3 * 2
    built = TARGET.build(tmp_path / "model.onnx", tmp_path, BuildRequest([{}]), lambda _: None)
    assert built.facts["compute_capabilities"] == [80, 86, 89, 120]
    assert any("conv" in layer["nodes"] and layer["dtype"] == "float16" for layer in built.layers)  # type: ignore[operator]


def test_warns_of_narrowed_types_and_doubled_weights(graph_of: Make, tmp_path: Path) -> None:
    graph = graph_of(
        "(float[n,64] x) => (float[n,64] y) { d = Cast <to = 11> (x) e = Mul(d, c) y = Cast <to = 1> (e) }",
        c=np.float64(2),
    )
    built, _ = build(graph, tmp_path, BuildRequest([{"n": Range(1, 2, 4)}, {"n": Range(8, 8, 8)}], (89,)))
    assert built.warnings == [
        "1 float64 tensors are float32 in the engine (first: 'c')",
        "profile 2 is static beside a dynamic one: the engine holds the weights twice",
    ]


@pytest.mark.parametrize(
    ("profiles", "capabilities", "expected"),
    [
        ([{"n": Range(4, 2, 8)}], (89,), ["profile: 'n' is 4, 2, 8, which is not 0 ≤ min ≤ opt ≤ max"]),
        ([{"m": Range(1, 1, 1), "n": Range(1, 1, 1)}], (89,), ["profile: no input has a dimension 'm'; known: n"]),
        (
            [{"n": Range(1, 1, 1)}],
            (75, 90),
            [
                "TensorRT-RTX does not build for SM90; it builds for SM75, SM80, SM86, SM89, SM120, SM121",
                "node 'product' (MatMul): is a float32 matrix product, which SM75 cannot run: "
                "convert the model to float16",
                "node 'det' (Det): TensorRT has no such operator: rewrite it in operators that it has",
            ],
        ),
    ],
)
def test_check_finds_all_that_is_wrong(
    profiles: Sequence[dict[str, Range]], capabilities: tuple[int, ...], expected: list[str], graph_of: Make
) -> None:
    bad = "[det] d = Det(p) y = Add(p, d)" if 90 in capabilities else "y = Relu(p)"
    graph = graph_of(f"(float[n,n] x) => (float[n,n] y) {{ [product] p = MatMul(x, x) {bad} }}")
    assert TARGET.check(graph, BuildRequest(profiles, capabilities)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "(float[4,4] x) => (float[4,4] y) { [f] a = my.domain.Foo(x) [d] b = Det(x) y = Add(a, b) }",
            "TensorRT-RTX cannot build this graph:\n"
            "  node 'f' (my.domain::Foo): TensorRT has no such operator: rewrite it in standard ONNX operators\n"
            "  node 'd' (Det): TensorRT has no such operator: rewrite it in standard ONNX operators",
        ),
        (
            "(float16[8,64] x, float[8,64] z) => (float[8,64] y) { [a] y = Add(x, z) }",
            "TensorRT-RTX cannot build this graph:\n"
            "  node 'a' (Add): a: ElementWiseOperation SUM must have same input types. But they are of types Half and "
            "Float: the network is strongly typed: add a Cast before it, or convert the whole model",
        ),
        (
            "(float[8,8] x, int64[2] s) => (float[a,b] y) { y = Reshape(x, s) }",
            "TensorRT-RTX cannot build this graph:\n"
            "  input 's' is used as a shape, not as data: make it a constant of the graph",
        ),
    ],
)
def test_what_the_parser_refuses_is_named_with_node_and_domain(
    text: str, message: str, graph_of: Make, tmp_path: Path
) -> None:
    with pytest.raises(TargetError) as error:
        build(graph_of(text), tmp_path, BuildRequest([], (89,)))
    assert str(error.value) == message
    assert error.value.exit_code == 4
    assert not list((tmp_path / "artifact").iterdir())


def test_what_the_builder_refuses_says_what_to_do(graph_of: Make, tmp_path: Path) -> None:
    graph = graph_of("(float16[256,256] x) => (float16[256,256] y) { y = MatMul(x, x) }")
    with pytest.raises(TargetError, match=r"no tactics .* within workspace limit.*: allow more workspace"):
        build(graph, tmp_path, BuildRequest([], (89,), workspace=1))
    assert not list((tmp_path / "artifact").iterdir())


def test_a_model_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"gone\.onnx"):
        TARGET.build(tmp_path / "gone.onnx", tmp_path, BuildRequest([]), lambda _: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "wrote [0-9,]+ bytes of engine, but the file has"),
        (lambda raw: raw[:32] + b"\x02" + raw[33:], r"the engine is for SM80, asked for was SM89"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_not_kept(
    change: Any, message: str, graph_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tensorrt_process.run

    def tamper(job: Any, progress: Any) -> Any:
        answer = run(job, progress)
        path = Path(job["engine"])
        path.write_bytes(change(path.read_bytes()))
        return answer

    monkeypatch.setattr(tensorrt_process, "run", tamper)
    with pytest.raises(TargetError, match=message):
        build(graph_of("(float[8] x) => (float[8] y) { y = Relu(x) }"), tmp_path, BuildRequest([], (89,)))
    assert not list((tmp_path / "artifact").iterdir())


def test_full_tensorrt_builds_for_the_gpu_at_hand_only(graph_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of("(float[8] x) => (float[8] y) { y = Relu(x) }")
    here = gpu.Driver("13.0", (gpu.Gpu("NVIDIA Test", 89, 1 << 30),))
    monkeypatch.setattr(tensorrt_module, "driver", lambda: here)
    monkeypatch.setattr(tensorrt_process, "run", lambda _job, _progress: [])
    target = TensorRT("tensorrt")
    assert target.check(graph, BuildRequest([], (89,))) == []
    assert target.check(graph, BuildRequest([], (80, 89))) == [
        "TensorRT builds for the GPU of this machine (SM89), not for SM80: leave compute capabilities out, or take "
        "target tensorrt-rtx"
    ]
