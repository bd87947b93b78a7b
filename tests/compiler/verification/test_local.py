"""Regions on captured values: an error is found where it is made, what did not change is not run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.errors import LlmcError
from llmc.compiler.session import Session
from llmc.compiler.verification.local import LocalVerifier
from llmc.passes.graph import Graph, Structure, from_model, to_structure

CHAIN = (
    "(float[N,4] x) => (float[N,4] y) <float c = {2}, float d = {3}> {"
    "a = Tanh(x) b = Mul(a, c) e = Add(b, d) f = Exp(e) g = Neg(f) h = Abs(g) y = Sqrt(h) }"
)


@pytest.fixture
def samples(random_feeds: Any, parse: Any) -> list[dict[str, Any]]:
    return [random_feeds(parse(CHAIN), seed, size) for seed, size in ((0, 3), (1, 5), (2, 2))]


def compare(verifier: LocalVerifier, before: Graph, after: Graph) -> Any:
    return verifier.compare(to_structure(before), to_structure(after))


def test_an_error_is_that_of_the_region_alone(samples: Any, parse: Any) -> None:
    """On two samples: the first, and the first of those that are no larger."""
    before, after = parse(CHAIN), parse(CHAIN.replace("e = Add(b, d)", "E = Add(b, d) e = Add(E, d)"))
    found = compare(LocalVerifier(samples), before, after)
    (region,) = found.regions
    values = [Session(before, ["e"]).run(sample, ["e"])["e"] for sample in (samples[0], samples[2])]
    squares = sum(float((v.astype(np.float64) ** 2).sum()) for v in values)
    added = sum(9.0 * v.size for v in values)
    assert region.relative_l2 == pytest.approx(np.sqrt(added / squares), rel=1e-6)  # float32 adds 3 to 2^-24
    assert region.nodes == ["E", "e"]
    assert not found.is_rounding()


def test_only_what_changed_runs(samples: Any, parse: Any, monkeypatch: Any) -> None:
    verifier = LocalVerifier(samples)
    compare(verifier, parse(CHAIN), parse(CHAIN.replace("f = Exp(e)", "z = Neg(e) q = Neg(z) f = Exp(q)")))
    ran: list[list[str]] = []
    run_each = Session.run_each

    def watched(self: Session, samples: Any, outputs: Any = None) -> Any:
        ran.append(list(outputs))
        return run_each(self, samples, outputs)

    monkeypatch.setattr(Session, "run_each", watched)
    found = compare(verifier, parse(CHAIN), parse(CHAIN.replace("f = Exp(e)", "z = Neg(e) q = Neg(z) f = Exp(q)")))
    assert ran == [["z", "q", "f"]]
    assert found.is_exact


def test_captured_values_follow_the_graph(samples: Any, parse: Any) -> None:
    """The second step reads a tensor that the first one made."""
    verifier = LocalVerifier(samples)
    first = parse(CHAIN.replace("f = Exp(e)", "z = Neg(e) q = Neg(z) f = Exp(q)"))
    second = parse(CHAIN.replace("f = Exp(e)", "z = Neg(e) q = Abs(z) f = Exp(q)"))
    verifier.accept(to_structure(first), compare(verifier, parse(CHAIN), first))
    assert {"z", "q"} <= verifier.values[0].keys()
    (region,) = compare(verifier, first, second).regions
    assert [output.output for output in region.outputs] == ["q"]
    verifier.accept(to_structure(parse(CHAIN)), compare(verifier, first, parse(CHAIN)))
    assert not {"z", "q"} & verifier.values[0].keys()


def test_a_folded_constant_is_compared_with_what_was_computed(samples: Any, parse: Any) -> None:
    before = parse(CHAIN.replace("b = Mul(a, c)", "k = Mul(c, d) b = Mul(a, k)"))
    for value, exact in ((6, True), (7, False)):
        after = parse(CHAIN.replace("float d", f"float k = {{{value}}}, float d").replace("(a, c)", "(a, k)"))
        assert compare(LocalVerifier(samples), before, after).is_exact is exact


def test_a_sample_with_padding_is_among_the_captured(parse: Any) -> None:
    graph = parse("(float[N,4] x, float[N,4] mask) => (float[N,4] y) { a = Mul(x, mask) b = Neg(a) y = Abs(b) }")
    ones, padded = np.ones((2, 4), np.float32), np.array([[1, 1, 1, 0]] * 2, np.float32)
    verifier = LocalVerifier([{"x": ones, "mask": mask} for mask in (ones, ones, ones, padded)])
    compare(
        verifier,
        graph,
        parse("(float[N,4] x, float[N,4] mask) => (float[N,4] y) { a = Mul(x, mask) b = Abs(a) y = Abs(b) }"),
    )
    assert [values["mask"].all() for values in verifier.values] == [True, False]


def test_nan_is_never_rounding(samples: Any, parse: Any) -> None:
    found = compare(LocalVerifier(samples), parse(CHAIN), parse(CHAIN.replace("f = Exp(e)", "z = Neg(e) f = Log(z)")))
    assert not found.regions[0].outputs[0].finite
    assert not found.is_rounding()


def test_a_region_grows_past_a_tensor_of_another_shape(random_feeds: Any, parse: Any) -> None:
    """[N, 1, 4] where [N, 4] was, and the next node takes both."""
    text = (
        "(float[1,4] x) => (float[4] y) <int64[1] one = {1}, int64[1] flat = {4}, int64[2] two = {1, 4}> {"
        "a = Reshape(x, two) b = Relu(a) c = Reshape(b, flat) d = Neg(c) e = Abs(d) f = Neg(e) y = Exp(f) }"
    )
    before, after = parse(text), parse(text.replace("a = Reshape(x, two)", "a = Unsqueeze(x, one)"))
    found = compare(LocalVerifier([random_feeds(before)]), before, after)
    assert [output.output for region in found.regions for output in region.outputs] == ["c"]
    assert found.is_exact


def test_most_of_the_graph_is_no_region(samples: Any, parse: Any) -> None:
    after = "(float[N,4] x) => (float[N,4] y) { p = Neg(x) q = Abs(p) y = Exp(q) }"
    assert compare(LocalVerifier(samples), parse(CHAIN), parse(after)) is None


def test_there_must_be_a_sample(parse: Any) -> None:
    with pytest.raises(LlmcError, match="no sample"):
        compare(LocalVerifier([]), parse(CHAIN), parse(CHAIN.replace("Exp", "Sin")))


WIDENED = (
    "(float[N,512] x) => (float[N,1024] y) {"
    "c = Cast<to = 1>(w) n = Neg(c) p = MatMul(x, n) q = MatMul(x, c) r = Add(p, q) s = Exp(r) y = Add(s, q) }"
)


def widened(text: str) -> Graph:
    """A graph with a float16 weight of a MB."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    weight = np.random.default_rng(0).standard_normal((512, 1024)) / 32
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float16), "w"))
    return from_model(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize(
    ("old", "new", "ran"),
    [
        ("q = MatMul(x, c)", "z = Neg(x) t = MatMul(z, c) q = Neg(t)", ["z", "t", "q"]),
        ("n = Neg(c)", "h = Neg(w) n = Cast<to = 1>(h)", ["p"]),
        ("c = Cast<to = 1>(w)", "h = Neg(w) k = Neg(h) c = Cast<to = 1>(k)", ["p", "q"]),
    ],
)
def test_weights_that_are_computed_are_computed_again(old: str, new: str, ran: list[str]) -> None:
    """They are not captured; a change in how they are computed shows where they are multiplied."""
    samples = [{"x": np.random.default_rng(1).standard_normal((rows, 512), np.float32)} for rows in (3, 2)]
    verifier = LocalVerifier(samples)
    before = to_structure(widened(WIDENED))

    def compared(text: str) -> Any:
        return verifier.compare(before, Structure(to_structure(widened(text)).model, before.weights))

    found = compared(WIDENED.replace(old, new))
    assert found.is_exact
    assert sorted(found.made[0]) == sorted(ran)
    assert all(values.keys() == {"x", *"pqrsy"} for values in verifier.values)
    assert not compared(WIDENED.replace(old, new).replace("Neg(", "Exp(", 1)).is_rounding()
