"""ONNX's own definitions of its operators, written out, must become the operator again.

The ONNX package's node tests come with 'expanded' twins, in which an operator is replaced by the function that defines
it. Here they are treated as a model would have them: weights are constants, and what only training asks for (mean and
deviation of LayerNormalization) is no output.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Pass
from llmc.passes.fuse.fuse_clip import FuseClip
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.fuse.fuse_group_norm import FuseGroupNorm
from llmc.passes.fuse.fuse_layer_norm import FuseLayerNorm
from llmc.passes.fuse.fuse_rms_norm import FuseRMSNorm
from llmc.passes.fuse.fuse_swish import FuseSwish
from llmc.passes.graph import Array, Graph, from_model
from llmc.passes.simplify.eliminate_common import EliminateCommon
from llmc.passes.simplify.eliminate_dead import EliminateDead
from llmc.passes.simplify.eliminate_identity import EliminateIdentity
from llmc.passes.simplify.fold_constants import FoldConstants

PASSES: tuple[Pass, ...] = (
    EliminateDead(),
    FoldConstants(),
    EliminateIdentity(),
    FoldConstants(),
    EliminateCommon(),
    FuseGroupNorm(),
    FuseLayerNorm(),
    FuseRMSNorm(),
    FuseGelu(),
    FuseSwish(),
    FuseClip(),
    EliminateDead(),
)

FUSED = {
    "Gelu": 4,
    "GroupNormalization": 2,
    "HardSwish": 1,
    "LayerNormalization": 38,
    "Mish": 1,
    "RMSNormalization": 19,
    "Relu": 1,
    "Swish": 1,
}
"""Operator → how many twins there are, all of which become the operator again."""

UNSEEN = "no exporter is known to write it so"
SHORT = "two or three operators that TensorRT has"
NEWER = "newer than opset 25, where TensorRT ends"
CONSTANT = "computed from constants: becomes one"
KEPT = {
    "AffineGrid": "an If chooses between two and three dimensions",
    "Attention": "fuse-attention has tests of its own",
    "Bernoulli": "random",
    "BlackmanWindow": CONSTANT,
    "CastLike": "becomes Cast",
    "CausalConvWithState": NEWER,
    "Celu": UNSEEN,
    "CenterCropPad": "becomes Pad and Slice, which TensorRT has, CenterCropPad it has not",
    "Clip": "by Less and Where, as no exporter is known to write it; Min and Max become Clip",
    "DepthToSpace": SHORT,
    "DynamicQuantizeLinear": "TensorRT does not have it, its parts it has",
    "Elu": UNSEEN,
    "FlexAttention": NEWER,
    "GreaterOrEqual": SHORT,
    "HammingWindow": CONSTANT,
    "HannWindow": CONSTANT,
    "HardSigmoid": "becomes Mul, Add and Clip",
    "LeakyRelu": UNSEEN,
    "LessOrEqual": SHORT,
    "LinearAttention": NEWER,
    "LogSoftmax": UNSEEN,
    "MeanVarianceNormalization": "ε stands behind the root, where LayerNormalization has it inside",
    "NegativeLogLikelihoodLoss": "for training",
    "PRelu": UNSEEN,
    "Range": NEWER,
    "ReduceL1": SHORT,
    "ReduceL2": SHORT,
    "ReduceLogSum": SHORT,
    "ReduceLogSumExp": SHORT,
    "ReduceSumSquare": SHORT,
    "RotaryEmbedding": "fuse-rotary-embedding has tests of its own",
    "Selu": UNSEEN,
    "SequenceMap": "a Loop over a sequence, which TensorRT does not have",
    "Shrink": UNSEEN,
    "Softmax": UNSEEN,
    "SoftmaxCrossEntropyLoss": "for training",
    "Softplus": UNSEEN,
    "Softsign": UNSEEN,
    "SpaceToDepth": SHORT,
    "SwiGLU": NEWER,
    "ThresholdedRelu": UNSEEN,
}
"""Operator → why its twins are not expected to become it."""


@dataclass(frozen=True)
class Twin:
    """A node test whose operator is written out, and what it must give."""

    name: str
    operator: str
    model: onnx.ModelProto
    inputs: list[Array]
    outputs: list[Array]

    def graph(self) -> tuple[Graph, dict[str, Array]]:
        """The graph of the first output, all inputs but the first made constants, and what to feed it."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        first, *weights = model.graph.input
        for info, value in zip(weights, self.inputs[1:], strict=True):
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, info.name))
        del model.graph.input[1:], model.graph.output[1:]
        model.ir_version = min(model.ir_version, 11)
        return from_model(model), {first.name: self.inputs[0]}


@pytest.fixture(scope="module")
def twins() -> list[Twin]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = {case.name: case for case in collect_testcases(None)}
    found = []
    for name, case in cases.items():
        base, expanded, _ = name.partition("_expanded")
        if expanded:
            operator = cases[base].model.graph.node[-1].op_type
            found.append(Twin(name, operator, case.model, *case.data_sets[0]))
    return found


def test_every_family_is_accounted_for(twins: list[Twin]) -> None:
    assert not FUSED.keys() & KEPT.keys()
    assert {twin.operator for twin in twins} == FUSED.keys() | KEPT.keys()
    assert {operator: sum(t.operator == operator for t in twins) for operator in FUSED} == FUSED


@pytest.mark.parametrize("operator", FUSED)
def test_becomes_the_operator_again(operator: str, twins: list[Twin]) -> None:
    for twin in (t for t in twins if t.operator == operator):
        graph, feeds = twin.graph()
        for step in PASSES:
            step.run(graph, Context())
        assert [node.op for node in graph.nodes] == [operator], twin.name
        (found,) = Session(graph).run(feeds).values()
        expected = twin.outputs[0]
        # float32: a few dozen roundings of 2^-24 each, relative to the largest value
        bound = 1e-5 * max(float(np.abs(expected).max()), 1.0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=twin.name)


def test_what_does_not_fuse_computes_the_same(twins: list[Twin]) -> None:
    compared = set()
    for twin in twins:
        newest = max(opset.version for opset in twin.model.opset_import)
        # ONNX Runtime ends at opset 26, and cannot run Swish above 24. It draws Bernoulli's numbers anew.
        swish = newest > 24 and any(node.op_type == "Swish" for node in twin.model.graph.node)
        if twin.operator in FUSED or newest > 26 or swish or twin.operator == "Bernoulli" or not is_float32(twin):
            continue
        graph, feeds = twin.graph()
        for step in PASSES:
            step.run(graph, Context())
        found = Session(graph).run(feeds)
        np.testing.assert_allclose(*found.values(), twin.outputs[0], rtol=1e-5, atol=1e-5, err_msg=twin.name)
        compared.add(twin.operator)
    assert len(compared) >= 20


def is_float32(twin: Twin) -> bool:
    return all(isinstance(v, np.ndarray) and v.dtype == np.float32 for v in (twin.inputs[0], twin.outputs[0]))
