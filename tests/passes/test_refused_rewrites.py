"""Any one rewrite of any pass can be left out: the others are done, keep their numbers, and the graph stays right."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, Pass, PassResult
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.graph import Graph, copy_graph, to_model
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.simplify.eliminate_common import EliminateCommon
from llmc.passes.simplify.eliminate_dead import EliminateDead
from llmc.passes.simplify.eliminate_identity import EliminateIdentity
from llmc.passes.simplify.fold_constants import FoldConstants
from llmc.passes.simplify.simplify_shapes import SimplifyShapes

GELUS = (
    "(float[N,4] x) => (float[N,4] y) <float s = {1.41421}, float one = {1.0}, float h = {0.5}> {"
    "d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) v = Mul(m, h)"
    "D = Div(v, s) E = Erf(D) A = Add(E, one) M = Mul(v, A) y = Mul(M, h) }"
)
DEAD = (
    "(float[N,4] x, bool c) => (float[N,4] y) { u = Abs(x) v = Exp(u) w = Add(u, v) y = Relu(x)"
    "z = If (c) <then_branch = a () => (float[N,4] t) { t = Neg(v) }, else_branch = b () => (float[N,4] f)"
    "{ q = Abs(v) f = Neg(q) }> }"
)
IDLE = (
    "(float[N,4] x) => (float[N,4] y) <float zero = {0.0}, float one = {1.0}> {"
    "a = Identity(x) b = Add(a, zero) c = Relu(b) d = Relu(c) e = Mul(d, one) y = Neg(e) }"
)
CONSTANT = (
    "(float[N,4] x) => (float[N,4] y) <float[4] p = {1, 2, 3, 4}, float[4] q = {2, 2, 2, 2}> {"
    "a = Add(p, q) b = Mul(a, q) c = Neg(b) y = Add(x, c) }"
)
EQUAL = (
    "(float[N,4] x) => (float[N,4] y) <float[4] p = {1, 2, 3, 4}, float[4] q = {1, 2, 3, 4}> {"
    "a = Add(x, p) b = Add(x, q) c = Relu(a) d = Relu(b) y = Mul(c, d) }"
)
SHAPED = (
    "(float[N,4] x) => (float[N,2,2] y, float[N,2,2] z) <int64[2] t = {2, 2}, int64[1] i = {0}> {"
    "s = Shape(x) n = Gather(s, i) r = Concat<axis = 0>(n, t) y = Reshape(x, r)"
    "m = Gather(s, i) R = Concat<axis = 0>(m, t) z = Reshape(x, R) }"
)
CASES = {
    "fuse-gelu": (FuseGelu(), GELUS),
    "eliminate-dead": (EliminateDead(), DEAD),
    "eliminate-identity": (EliminateIdentity(), IDLE),
    "fold-constants": (FoldConstants(), CONSTANT),
    "eliminate-common": (EliminateCommon(), EQUAL),
    "simplify-shapes": (SimplifyShapes(), SHAPED),
    "convert-fp16": (ConvertFp16(), GELUS),
}


def outcome(graph: Graph, step: Pass, ledger: Ledger) -> tuple[Graph, PassResult]:
    graph = copy_graph(graph)
    return graph, step.run(graph, Context(ledger))


@pytest.mark.parametrize(("step", "text"), CASES.values(), ids=CASES)
def test_each_rewrite_can_be_left_out(step: Pass, text: str, parse: Any, random_feeds: Any) -> None:
    graph = parse(text)
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    _, everything = outcome(graph, step, Ledger())
    assert len(everything.rewrites) > 1
    for left_out in everything.rewrites:
        ledger = Ledger(refused={(left_out.rule, left_out.node)})
        after, result = outcome(graph, step, ledger)
        onnx.checker.check_model(to_model(after), full_check=True)
        assert (left_out.rule, left_out.node) not in {(r.rule, r.node) for r in result.rewrites}
        earlier = [r for r in everything.rewrites if r.number < left_out.number]
        assert result.rewrites[: len(earlier)] == earlier
        assert left_out.number not in {r.number for r in result.rewrites}
        assert ledger.offered == {(left_out.rule, left_out.node)}
        for name, value in Session(after).run(feeds).items():
            # float16 rounds each of ten results by 2^-11 at most; the other passes are exact or nearly so
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=10 * 2.0**-11 * np.abs(expected[name]).max())


def test_independent_rewrites_are_all_done_but_the_refused_one(parse: Any) -> None:
    graph = parse(GELUS)
    result = FuseGelu().run(graph, Context(Ledger(refused={("GeluFromErf", graph.nodes[4].name)})))
    assert [n.op for n in graph.nodes].count("Erf") == 1
    assert [r.number for r in result.rewrites] == [2]
