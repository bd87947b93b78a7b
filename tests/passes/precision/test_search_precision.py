"""Mixed precision by budget: what is found is within the budget, and nothing cheaper on the way to it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, LlmcError, PassResult
from llmc.passes.graph import Array, Graph, copy_graph
from llmc.passes.precision.distance import distance, row_cosines
from llmc.passes.precision.search_precision import SearchPrecision

LAYERS = 6
SAMPLES = 16


@pytest.fixture
def network(parse: Any) -> Graph:
    """Six residual layers; INT8 takes most of what the fourth one reads: one channel is 1000 times the others."""
    rng = np.random.default_rng(0)
    lines, weights = [], []
    for number in range(LAYERS):
        weight, scale = rng.standard_normal((16, 16)) / 4, np.ones(16)
        if number == 3:
            scale[5] = 1000.0
            weight[5] /= 1000.0
        weights.append(f"float[16,16] w{number} = {{{_list(weight)}}}, float[16] s{number} = {{{_list(scale)}}}")
        lines.append(f"a{number} = Tanh(x{number}) b{number} = Mul(a{number}, s{number})")
        lines.append(f"[product{number}] p{number} = MatMul(b{number}, w{number})")
        lines.append(f"x{number + 1} = Add(x{number}, p{number})")
    text = f"(float[N,16] x0) => (float[N,16] x{LAYERS}) <{', '.join(weights)}> {{ {' '.join(lines)} }}"
    graph: Graph = parse(text)
    return graph


def _list(values: Array) -> str:
    return ", ".join(f"{value:.6f}" for value in values.reshape(-1))


def random_samples(seed: int, count: int = SAMPLES) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x0": rng.standard_normal((4, 16)).astype(np.float32)} for _ in range(count)]


def activations(judged: list[dict[str, Array]] | None = None) -> SampledActivations:
    """Of samples to calibrate on, with others to judge on."""
    held_out = SampledActivations(random_samples(2) if judged is None else judged)
    return SampledActivations(random_samples(1), held_out=held_out)


@pytest.fixture
def search(network: Graph) -> Callable[..., tuple[Graph, PassResult, float]]:
    """Run the pass; gives the graph, what was done, and the cosine that this test measures itself."""

    def search(
        stop_after: int | None = None, judged: list[dict[str, Array]] | None = None, **settings: Any
    ) -> tuple[Graph, PassResult, float]:
        graph = copy_graph(network)
        given = {"calibration": {"method": "minmax"}, **settings}
        context = Context(Ledger(stop_after), activations(judged))
        result = SearchPrecision.model_validate(given).run(graph, context)
        before, after = Session(network), Session(graph)
        measured = random_samples(2) if judged is None else judged
        return graph, result, distance((before.run(s), after.run(s)) for s in measured).cosine

    return search


def int8_products(graph: Graph) -> set[str]:
    return {
        node.name for node in graph.nodes if node.op == "MatMul" and node.inputs[0].inputs[0].op == "DequantizeLinear"
    }


def test_only_the_layer_that_breaks_the_budget_is_left_out(search: Callable[..., Any]) -> None:
    graph, result, cosine = search(search=["int8", "fp32"], budget={"cosine": 0.999})
    assert cosine >= 0.999
    assert int8_products(graph) == {f"product{number}" for number in (0, 1, 2, 4, 5)}
    assert set(result.kept) == {"product3"}
    assert result.asked == dict.fromkeys(int8_products(graph), "int8")
    (chosen,) = [point for point in result.frontier if point.chosen]
    assert (chosen.layers, chosen.left) == (5, ("product3",))
    assert chosen.cosine == pytest.approx(cosine, abs=1e-12), "it is measured on samples that did not calibrate"
    everything = next(point for point in result.frontier if not point.left)
    assert everything.cosine < 0.999, "nothing need have been left out"
    assert everything.weight_bytes < chosen.weight_bytes
    assert everything.time == 0.25 < chosen.time


def test_a_loose_budget_leaves_nothing_out_and_a_tight_one_everything(search: Callable[..., Any]) -> None:
    graph, result, _ = search(search=["int8", "fp32"], budget={"cosine": 0.1})
    assert len(int8_products(graph)) == LAYERS
    assert [point.chosen for point in result.frontier if not point.left] == [True]
    graph, result, cosine = search(search=["int8", "fp32"], budget={"relative_l2": 1e-6})
    assert int8_products(graph) == set()
    assert cosine == 1.0
    assert len(result.kept) == LAYERS


def test_what_is_left_out_becomes_fp16_where_that_is_searched(search: Callable[..., Any]) -> None:
    graph, result, cosine = search(budget={"cosine": 0.999})
    assert cosine >= 0.999
    assert result.asked["product3"] == "float16"
    assert result.asked["product2"] == "int8"
    (product,) = [node for node in graph.nodes if node.name == "product3"]
    assert product.outputs[0].dtype == np.float16


def test_no_assignment_will_do(search: Callable[..., Any]) -> None:
    with pytest.raises(LlmcError, match=r"with int8 and fp16 the outputs keep to a cosine of .* add fp32 to search"):
        search(search=["int8", "fp16"], budget={"relative_l2": 1e-9})


def test_the_same_data_gives_the_same_answer(search: Callable[..., Any]) -> None:
    assert search(budget={"cosine": 0.9995})[1] == search(budget={"cosine": 0.9995})[1]


def test_a_run_can_stop_inside_it(search: Callable[..., Any]) -> None:
    graph, result, _ = search(search=["int8", "fp32"], budget={"cosine": 0.999}, stop_after=2)
    assert [rewrite.number for rewrite in result.rewrites] == [1, 2]
    assert len(int8_products(graph)) == 2


@pytest.mark.parametrize(
    ("expected", "found", "cosine"),
    [
        ([[1.0, 0.0]], [[2.0, 0.0]], 1.0),
        ([[1.0, 0.0]], [[0.0, 2.0]], 0.0),
        ([[0.0, 0.0]], [[0.0, 0.0]], 1.0),
        ([[0.0, 0.0]], [[1.0, 0.0]], 0.0),
        ([[1.0, 0.0]], [[np.nan, 0.0]], 0.0),
        ([[1.0, 0.0]], [[np.inf, 0.0]], 0.0),
    ],
)
def test_cosine_of_rows(expected: list[list[float]], found: list[list[float]], cosine: float) -> None:
    np.testing.assert_array_equal(row_cosines(np.array(expected), np.array(found)), [cosine])


def test_the_budget_holds_with_confidence_not_on_average_alone(search: Callable[..., Any]) -> None:
    """A budget between the mean and the bound of the assignment chosen for a looser one: it is not chosen any more."""
    _, loose, _ = search(search=["int8", "fp32"], budget={"cosine": 0.999})
    (before,) = [point for point in loose.frontier if point.chosen]
    assert before.cosine_bound < before.cosine
    between = (before.cosine + before.cosine_bound) / 2
    _, tight, _ = search(search=["int8", "fp32"], budget={"cosine": between})
    (after,) = [point for point in tight.frontier if point.chosen]
    assert after.cosine_bound >= between
    assert after.layers < before.layers


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (None, r"needs samples that do not calibrate: give some with judge\.data"),
        (SampledActivations(random_samples(2, count=7)), r"judges on 7 samples, and 8 are the fewest"),
    ],
)
def test_too_few_samples_to_judge_on(network: Graph, held_out: SampledActivations | None, message: str) -> None:
    given = SampledActivations(random_samples(1), held_out=held_out)
    with pytest.raises(LlmcError, match=message):
        SearchPrecision().run(network, Context(activations=given))
