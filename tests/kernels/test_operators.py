"""What every operator of llmc's own owes, and how models carry it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler.cache.keys import code_digest
from llmc.compiler.session import Session
from llmc.kernels.codebook_matmul.reference import pack
from llmc.passes.graph import (
    KERNELS,
    from_model,
    in_standard_operators,
    load_model,
    save_model,
    specs,
    to_model,
)
from llmc.passes.graph.functions import body
from llmc.passes.opset import raise_opset

MODEL = """<ir_version: 11, opset_import: ["": 21, "llmc": 1, "other": 1]>
g (float[N] x) => (float[N] y) { a = llmc.CodebookMatMul <bits = 4> (x, x, x) y = other.Twice (a) }
<domain: "other", opset_import: ["": 21]> Twice (a) => (b) { b = Add (a, a) }
"""


@pytest.fixture
def product(one_node):
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((3, 5, 16)).astype(np.float32)
    given = {"x": np.zeros((1, 45), np.float32), "packed": pack(rng.integers(0, 16, (6, 45)), 4), "codebook": codebook}
    return one_node("CodebookMatMul", given, {"y": np.float32}, bits=4)


@pytest.mark.parametrize("operator", specs())
def test_a_folder_is_named_as_its_operator_and_complete(operator: str) -> None:
    folder = Path(specs()[operator].__file__).parent
    assert folder.parent == KERNELS
    assert folder.name.replace("_", "") == operator.lower()
    assert {"__init__.py", "spec.py", "reference.py"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("operator", specs())
def test_a_body_has_the_inputs_and_outputs_of_the_schema(operator: str) -> None:
    schema, function = specs()[operator].SCHEMA, onnx.parser.parse_function(specs()[operator].BODY)
    assert (schema.domain, schema.name) == (function.domain, function.name) == ("llmc", operator)
    assert [given.name for given in schema.inputs] == list(function.input)
    assert [made.name for made in schema.outputs] == list(function.output)
    named = {*function.attribute, *(attribute.name for attribute in function.attribute_proto)}
    assert set(schema.attributes) == named
    assert all(node.domain == "" for node in function.node)
    onnx.checker.check_function(function)


def test_a_saved_model_carries_the_body_and_is_read_back_with_the_operator(product, tmp_path) -> None:
    save_model(product, tmp_path / "model.onnx")
    (function,) = onnx.load(tmp_path / "model.onnx").functions
    assert function.name == "CodebookMatMul"
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    (node,) = load_model(tmp_path / "model.onnx").nodes
    assert (node.domain, node.op, node.attrs) == ("llmc", "CodebookMatMul", {"bits": 4})


def test_spelled_out_it_computes_the_same(product) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 45)).astype(np.float32)}
    spelled = in_standard_operators(product)
    assert all(node.domain in (None, "") for node in spelled.nodes)
    assert Session(spelled).run(feeds)["y"].tobytes() == Session(product).run(feeds)["y"].tobytes()


def test_functions_of_others_are_inlined() -> None:
    foreign = onnx.parser.parse_model(MODEL)
    foreign.functions.append(body("CodebookMatMul", 21))
    assert [node.op for node in from_model(foreign).nodes] == ["CodebookMatMul", "Add"]


def test_another_body_than_ours_is_not_taken_for_ours(product) -> None:
    model = to_model(product)
    model.functions[0].node[-1].op_type = "Gemm"
    assert "Gemm" in [node.op for node in from_model(model).nodes]


def test_the_opset_of_a_graph_with_the_operator_can_be_raised(product) -> None:
    assert raise_opset(product, 23) is None
    assert [node.op for node in product.nodes] == ["CodebookMatMul"]
    assert to_model(product).functions[0].opset_import[0].version == 23


def test_a_graph_of_too_old_an_opset_is_refused(product) -> None:
    product.opset = 13
    with pytest.raises(ValueError, match="llmc::CodebookMatMul needs opset 15, the graph has 13"):
        to_model(product)


def test_a_changed_body_is_a_change_of_code(monkeypatch, tmp_path) -> None:
    def digest() -> str:
        for known in (code_digest, *_caches()):
            known.cache_clear()
        return code_digest("llmc.passes.graph.functions")

    before = digest()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "spec.py").write_text("BODY = ''", encoding="utf-8")
    monkeypatch.setattr("llmc.passes.graph.KERNELS", tmp_path)
    assert digest() != before
    monkeypatch.undo()
    assert digest() == before


def _caches():
    from llmc.compiler.cache import keys

    return keys._sources, keys._read
