from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmc.passes.base import LlmcError
from llmc.passes.graph import Node, metadata
from llmc.passes.precision.quantize_int8 import QuantizeInt8
from llmc.passes.precision.selection import named


def node(op: str, name: str, module: str = "") -> Node:
    made = Node(op, name)
    if module:
        metadata(made)["pkg.torch.onnx.name_scopes"] = str(["", *module.split("/"), "leaf"])
    return made


NODES = [
    node("Conv", "stem", "encoder.stem"),
    node("MatMul", "/layer.0/query/MatMul", "encoder.layer.0.query"),
    node("MatMul", "/layer.10/query/MatMul", "encoder.layer.10.query"),
    node("Gemm", "head[0]", "classifier"),
]


@pytest.mark.parametrize(
    ("patterns", "taken"),
    [
        ([], []),
        (["*"], [0, 1, 2, 3]),
        (["stem"], [0]),
        (["*/query/*"], [1, 2]),
        (["encoder.layer.0.*"], [1]),
        (["MatMul"], [1, 2]),
        (["Gemm", "Conv"], [0, 3]),
        ([r"re:layer\.\d\b"], [1]),
        ([r"re:^classifier$"], [3]),
        (["first"], [0]),
        (["last"], [3]),
        (["first", "last"], [0, 3]),
    ],
)
def test_patterns_name_nodes_by_name_module_path_operator_and_place(patterns, taken):
    assert set(named(NODES, patterns, "")) == {id(NODES[i]) for i in taken}


def test_the_first_pattern_that_names_a_node_is_given():
    assert named(NODES, ["MatMul", "*query*"], "")[id(NODES[1])] == "MatMul"


def test_what_is_included_and_not_excluded_is_taken():
    refusals = QuantizeInt8(include=["MatMul", "first"], exclude=[r"re:layer\.10"]).refusals(NODES)
    assert refusals == {id(NODES[2]): r"excluded by 're:layer\.10'", id(NODES[3]): "no pattern includes it"}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("encoder.layer.0.qeury", "nearest: 'encoder.layer.0.query'"), ("re:quary", ""), ("MatMal", "nearest: 'MatMul'")],
)
def test_a_pattern_that_names_nothing_is_an_error(pattern, hint):
    with pytest.raises(LlmcError, match=f"^keep pattern '{pattern}' matches no node that it could take.*{hint}"):
        named(NODES, [pattern], "keep")


def test_everything_of_nothing_is_no_error():
    assert named([], ["*"], "") == {}
    with pytest.raises(LlmcError, match="'first' matches no node"):
        named([], ["first"], "")


def test_an_expression_that_cannot_be_read_is_a_fault_of_the_recipe():
    with pytest.raises(ValidationError, match=r"'re:\(' is no regular expression: missing \)"):
        QuantizeInt8(include=["re:("])
