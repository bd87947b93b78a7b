"""Metrics of logits, and metrics of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe.sections import METRICS, CustomMetric, VerifySection
from llmc.compiler.verification import breaches, compare
from llmc.compiler.verification.custom import load_custom
from llmc.compiler.verification.metrics import log_softmax


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(2, 9), st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_metrics_of_logits_are_their_definitions(seed: int, rows: int, classes: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    expected = rng.standard_normal((1, rows, classes)).astype(np.float32) * 5
    found = (expected + noise * rng.standard_normal(expected.shape)).astype(np.float32)
    (line,) = compare([({"logits": expected}, {"logits": found})])
    p, q = (torch.from_numpy(v.astype(np.float64)).log_softmax(-1) for v in (expected, found))
    divergence = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / rows
    assert line.kl == pytest.approx(float(divergence), abs=1e-12)
    k = min(5, classes)
    tops = [set(row.tolist()) for row in torch.from_numpy(expected).topk(k).indices.reshape(rows, k)]
    other = [set(row.tolist()) for row in torch.from_numpy(found).topk(k).indices.reshape(rows, k)]
    assert line.top5 == pytest.approx(np.mean([len(a & b) / k for a, b in zip(tops, other, strict=True)]))
    assert line.top1 == pytest.approx(float((expected.argmax(-1) == found.argmax(-1)).mean()))


def test_large_logits_do_not_overflow() -> None:
    assert log_softmax(np.array([[1e4, 0.0]])).tolist() == [[0.0, -1e4]]


def test_they_are_measured_of_logits_or_where_asked_for() -> None:
    pairs = [({"logits": np.eye(3), "hidden": np.eye(3)}, {"logits": np.eye(3), "hidden": np.eye(3)})]
    by_name = {line.output: line for line in compare(pairs)}
    assert (by_name["logits"].top1, by_name["hidden"].top1) == (1.0, None)
    asked = VerifySection.model_validate({"budgets": {"top1": 0.9}}).asked
    assert asked == (*METRICS, "top1")
    assert {line.output: (line.top1, line.kl) for line in compare(pairs, asked)} == {
        "logits": (1.0, 0.0), "hidden": (1.0, None)
    }  # fmt: skip


def test_budgets_of_logits() -> None:
    numerics = compare([({"logits": np.eye(2)}, {"logits": np.eye(2)[::-1].copy()})])
    (first, second) = breaches(numerics, {"top1": 0.5, "kl": 0.1})
    assert "top1 is 0, the budget asks for at least 0.5" in first
    assert "kl is 0.462117, the budget allows at most 0.1" in second  # (e - 1) / (e + 1)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_metrics.py").write_text(
        "def largest_ratio(expected, found):\n    return (found / expected).max()\nBROKEN = 3\n"
    )
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    return tmp_path


def test_a_metric_of_ones_own(mine: Path) -> None:
    metric = CustomMetric(function="my_metrics:largest_ratio", at_most=1.5)
    custom = load_custom({"ratio": metric}, mine)
    ones = np.ones((2, 2))
    pairs = [({"y": ones}, {"y": ones * factor}) for factor in (1.0, 3.0)]
    numerics = compare(pairs, METRICS, custom)
    assert numerics[0].custom == {"ratio": 2.0}
    assert breaches(numerics, {}, {"ratio": metric}) == ["output 'y': ratio is 2, at most 1.5 is allowed"]
    assert str(mine) not in sys.path


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("no_such_module:f", "No module named"),
        ("my_metrics:g", "no attribute 'g'"),
        ("my_metrics:BROKEN", "no function"),
    ],
)
def test_what_cannot_be_imported_says_so(function: str, reason: str, mine: Path) -> None:
    with pytest.raises(LlmcError, match=rf"verify\.custom\.m: .*{reason}"):
        load_custom({"m": CustomMetric(function=function)}, mine)


def test_a_metric_that_fails_is_named() -> None:
    def fails(*_: Any) -> float:
        raise ValueError("no rows")

    with pytest.raises(LlmcError, match=r"verify\.custom\.m failed: ValueError: no rows"):
        compare([({"y": np.ones(2)}, {"y": np.ones(2)})], METRICS, {"m": fails})
