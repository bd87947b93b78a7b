"""Models that run block by block give the same bits as in one piece."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.blocks import Blocks, Part, blocks_of
from llmc.compiler.runner import Runner
from llmc.compiler.spill import Spill
from llmc.passes.base import LlmcError
from llmc.passes.graph import Array, Elementwise, Structure, from_model, loaded, to_structure

WIDTH = 32
WEIGHT = WIDTH * WIDTH * 4
"""Bytes of one float32 weight below: large enough to stand outside of the proto."""


def layers(count: int, body: str = "w{i}", rng: np.random.Generator | None = None) -> Structure:
    """x → count products with weights of their own; `body` computes the weight of product i from its initializer."""
    rng = rng or np.random.default_rng(0)
    lines, weights = [], []
    for i in range(count):
        computed = body.format(i=i)
        lines += [
            f"c{i} = {computed}" if computed != f"w{i}" else f"c{i} = Identity(w{i})",
            f"p{i} = MatMul(h{i}, c{i})",
        ]
        lines.append(f"h{i + 1} = Tanh(p{i})")
        weights.append(onnx.numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH), np.float32), f"w{i}"))
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[N,{WIDTH}] h0) => (float[N,{WIDTH}] h{count}) {{
        {chr(10).join(lines)} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(weights)
    return to_structure(from_model(onnx.shape_inference.infer_shapes(model)))


def values(rows: int = 3) -> dict[str, Array]:
    return {"h0": np.random.default_rng(1).standard_normal((rows, WIDTH), np.float32)}


def one(model: Blocks | Runner, feeds: dict[str, Array], names: list[str]) -> list[Array]:
    (found,) = model.run_each([feeds], names)
    return found


def operators(part: Part | None) -> list[str]:
    return [] if part is None else [node.op_type for node in part.structure.model.graph.node]


@given(st.integers(1, 7), st.integers(1, 8 * WEIGHT))
@settings(deadline=None, max_examples=20)
def test_same_bits_as_in_one_piece(count: int, limit: int) -> None:
    structure = layers(count)
    names = [f"h{i}" for i in range(1, count + 1)]
    structure.model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names[:-1])
    blocks = blocks_of(structure, whole=0, limit=limit)
    assert (blocks is None) == (limit >= count * WEIGHT or count == 1)
    if blocks is not None:
        expected = one(Runner(structure), values(), names)
        for value, other in zip(expected, one(blocks, values(), names), strict=True):
            np.testing.assert_array_equal(value, other)


def test_no_block_reads_more_than_the_limit() -> None:
    blocks = blocks_of(layers(6), whole=0, limit=2 * WEIGHT)
    assert blocks is not None
    assert [len(block.fixed.structure.weights) for block in blocks.blocks if block.fixed] == [2, 2, 2]
    assert all(len(block.body.outputs) == 1 for block in blocks.blocks), "one tensor goes from block to block"
    assert blocks_of(layers(6), whole=6 * WEIGHT, limit=1) is None


def test_a_weight_that_is_computed_from_constants_moves_to_the_block_that_reads_it() -> None:
    """All of them stand at the beginning of the graph, as in files that other tools have quantized."""
    structure = layers(4, "Transpose(w{i})")
    nodes = sorted(structure.model.graph.node, key=lambda node: node.op_type != "Transpose")
    del structure.model.graph.node[:]
    structure.model.graph.node.extend(nodes)
    blocks = blocks_of(structure, whole=0, limit=WEIGHT)
    assert blocks is not None
    assert [operators(block.fixed) for block in blocks.blocks] == [["Transpose"]] * 4
    assert [operators(block.body) for block in blocks.blocks] == [["MatMul", "Tanh"]] * 4
    np.testing.assert_array_equal(one(blocks, values(), ["h4"])[0], one(Runner(structure), values(), ["h4"])[0])


def test_types_that_numpy_has_not_go_from_block_to_block() -> None:
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[N,{WIDTH}] x) => (float[N,{WIDTH}] y) {{
        p = MatMul(x, a)  low = Cast<to = 16>(p)  q = MatMul(x, b)  high = Cast<to = 1>(low)  y = Add(high, q) }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name in "ab":
        weight = rng.standard_normal((WIDTH, WIDTH), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    structure = to_structure(from_model(onnx.shape_inference.infer_shapes(model)))
    blocks = blocks_of(structure, whole=0, limit=WEIGHT)
    assert blocks is not None
    assert "low" in blocks.blocks[0].body.outputs
    x = values()["h0"]
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    (found,) = one(blocks, {"x": x}, ["y"])
    rounded = (x @ weights["a"]).astype(ml_dtypes.bfloat16).astype(np.float32)
    # Sums in another order may fall on the other side of a rounding to 8 bits.
    np.testing.assert_allclose(found, rounded + x @ weights["b"], atol=2.0**-7 * float(np.abs(rounded).max()))


@pytest.mark.parametrize("captured", ["h1", "w2"])
def test_what_a_subgraph_captures_is_handed_on(captured: str) -> None:
    structure = layers(3)
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (bool q, float[N,{WIDTH}] h3) => (float[N,{WIDTH}] y) {{
        y = If(q) <then_branch = t () => (float[N,{WIDTH}] a) {{ a = Tanh(h3) }},
                   else_branch = e () => (float[N,{WIDTH}] b) {{ k = ReduceSum({captured}) b = Add(h3, k) }}> }}"""
    branch = onnx.parser.parse_model(text).graph
    graph = structure.model.graph
    graph.node.extend(branch.node)
    graph.input.extend(branch.input[:1])
    graph.output[0].CopyFrom(branch.output[0])
    blocks = blocks_of(structure, whole=0, limit=WEIGHT)
    assert blocks is not None
    for choice in (True, False):
        feeds = {**values(), "q": np.array(choice)}
        np.testing.assert_array_equal(one(blocks, feeds, ["y"])[0], one(Runner(structure), feeds, ["y"])[0])


def test_a_block_that_cannot_run_is_told_before_anything_runs() -> None:
    structure = layers(3)
    structure.model.graph.node[-1].op_type = "Unknown"
    with pytest.raises(LlmcError, match="Unknown"):
        blocks_of(structure, whole=0, limit=WEIGHT)


def test_samples_go_through_together_each_with_its_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those asked for come from disk where they are large; so few fit that a second group is needed."""
    structure = layers(4, "Transpose(w{i})")
    blocks = blocks_of(structure, whole=0, limit=WEIGHT)
    assert blocks is not None
    samples = [values(rows) for rows in (600, 1, 5, 600, 2)]
    monkeypatch.setattr("llmc.compiler.blocks.GROUP_BYTES", 2 * 600 * 32 * 4)
    found = list(blocks.run_each(samples, ["h4", "h0"]))
    for sample, (made, given_back) in zip(samples, found, strict=True):
        np.testing.assert_array_equal(made, one(Runner(structure), sample, ["h4"])[0])
        np.testing.assert_array_equal(given_back, sample["h0"])
    assert isinstance(found[0][0].base, np.memmap)
    assert not isinstance(found[1][0].base, np.memmap)


@pytest.mark.parametrize("wide", [WEIGHT, WEIGHT + 1])
def test_computed_weights_are_computed_only_where_a_block_runs(monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
    """In 16 bits too, which ONNX Runtime takes as a value with every run, not as an array; large ones in a file."""
    spilled = list[Any]()
    put = Spill.put_weight
    monkeypatch.setattr(Spill, "put_weight", lambda spill, held: (spilled.append(held), put(spill, held))[1])
    monkeypatch.setattr("llmc.compiler.runner.WIDE", wide)
    monkeypatch.setattr("llmc.compiler.runner.FED_FROM", WEIGHT // 2)
    structure = layers(3, "Cast<to = 1>(w{i})")
    for tensor in structure.model.graph.initializer:
        tensor.data_type = onnx.TensorProto.BFLOAT16
    made = list[str]()

    def computed(name: str, held: Array) -> Elementwise:
        def narrow(block: Array) -> Array:
            made.append(name)
            return block.astype(ml_dtypes.bfloat16)

        return Elementwise(onnx.TensorProto.BFLOAT16, held, narrow)

    weights = {name: computed(name, loaded(held)) for name, held in structure.weights.items()}
    blocks = blocks_of(Structure(structure.model, weights), whole=0, limit=WEIGHT)
    assert blocks is not None
    assert made == []
    names = ["h3", "h1"]
    found = one(blocks, values(), names)
    assert made == ["w0", "w1", "w2"]
    assert spilled == (list(weights.values()) if wide == WEIGHT else [])
    expected = values()["h0"]
    for held in weights.values():
        expected = np.tanh(expected @ held.load().astype(np.float32))
    # float32 sums of 32 products in another order, three times over: 2^-24 each
    np.testing.assert_allclose(found[0], expected, atol=3 * 32 * 2.0**-24)
