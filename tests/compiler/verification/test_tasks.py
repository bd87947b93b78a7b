"""Measures of a task: by their definitions, by transformers' own loss, and as a limit of a compile."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from llmc.compiler import BudgetError
from llmc.compiler import compile as run_compile
from llmc.compiler.artifact import check_artifact
from llmc.compiler.cli import app
from llmc.compiler.data.labelled import Labelled, read_labelled
from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe.sections import TaskSection
from llmc.compiler.session import Session
from llmc.compiler.verification.tasks import Task, accuracy, f1, pearson, spearman
from llmc.passes.graph import Graph

WORDS = ("a", "b", "c", "d")
TABLE = np.array([[4, 1, 0], [0, 3, 1], [1, 0, 3], [1, 1, 1]], np.float32)
CLASSIFIER = """(int64[batch,sequence] input_ids) => (float[batch,3] logits)
    <float[4,3] table = {4, 1, 0, 0, 3, 1, 1, 0, 3, 1, 1, 1}> {
        e = Gather(table, input_ids)
        one = Constant<value = int64[1] {1}>()
        logits = ReduceMean<keepdims = 0>(e, one)
    }"""
LANGUAGE = CLASSIFIER.replace("float[batch,3] logits", "float[batch,sequence,3] logits").partition("one =")[0].replace(
    "e = Gather", "logits = Gather"
) + "}"  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="d"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def task(tokenizer: Path) -> Callable[..., Task]:
    def task(metric: Any, graph: Graph, rows: list[dict[str, Any]], **more: Any) -> Task:
        data = tokenizer / "labelled.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        return Task(TaskSection(metric=metric, data=data, **more), graph, tokenizer, None)

    return task


def test_accuracy_and_f1_of_a_classifier(task: Any, parse: Any) -> None:
    graph = parse(CLASSIFIER)
    rows = [{"text": text, "label": label} for text, label in (("a", 0), ("b", 1), ("c c", 2), ("a b", 1))]
    run = Session(graph).run  # 'a b' → [2, 2, 0.5]: class 0, the first of two that are equal
    assert task("accuracy", graph, rows).measure(run) == 0.75
    assert task("f1", graph, rows).measure(run) == pytest.approx(np.mean([2 / 3, 2 / 3, 1]))
    assert task("accuracy", graph, rows, samples=2).measure(run) == 1


def test_correlation_of_embeddings_with_scores(task: Any, parse: Any) -> None:
    graph = parse(CLASSIFIER)
    pairs = [("a", "a", 5), ("a", "b", 2), ("b", "c", 1), ("a", "c", 3)]
    rows = [{"text": one, "text_pair": other, "label": label} for one, other, label in pairs]

    def cosine(one: str, other: str) -> float:
        u, v = (TABLE[WORDS.index(word)].astype(np.float64) for word in (one, other))
        return float(u @ v / np.sqrt((u @ u) * (v @ v)))

    expected = np.corrcoef([cosine(one, other) for one, other, _ in pairs], [label for *_, label in pairs])[0, 1]
    assert task("pearson", graph, rows).measure(Session(graph).run) == pytest.approx(expected)


def test_perplexity_is_the_exponential_of_the_mean_loss(task: Any, parse: Any) -> None:
    import torch

    graph = parse(LANGUAGE)
    rows = [{"text": "a b c a"}, {"text": "c b"}, {"text": "a"}]
    loss, count = 0.0, 0
    for ids in ([0, 1, 2, 0], [2, 1]):
        logits = torch.from_numpy(TABLE[ids[:-1]]).double()
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    measured = task("perplexity", graph, rows)
    assert measured.measure(Session(graph).run) == pytest.approx(np.exp(loss / count))
    assert measured.drop(2.0, 2.5) == pytest.approx(0.25)


def test_definitions() -> None:
    assert accuracy([1, 0, 2], [1, 1, 2]) == pytest.approx(2 / 3)
    assert f1([1, 1, 0, 0], [1, 0, 1, 0]) == pytest.approx(0.5)
    assert f1([0, 0], [1, 1]) == 0
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert np.isnan(pearson([1, 1], [2, 3]))
    # ranks of the first: 1, 2.5, 2.5, 4; of the second 1, 2, 3, 4: 4.5 / sqrt(4.5 · 5)
    assert spearman([10, 20, 20, 30], [1, 2, 3, 400]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', r"x\.jsonl:2 has no label"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{', r"x\.jsonl:2 is not JSON"),
        ("x.jsonl", "[1]", r"x\.jsonl:1 is no object"),
        ("x.tsv", "a\t1", r"x\.tsv:1 is no header"),
        ("x.tsv", "text\tlabel\na\tgood", r"x\.tsv:2: label 'good' is no number"),
        ("x.tsv", "text\tlabel\n", "holds no samples"),
        ("x.txt", "a", r"a \.jsonl or a \.tsv file"),
    ],
)
def test_bad_data_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LlmcError, match=message):
        read_labelled(tmp_path / name, pairs=False, labels=True)


def test_both_formats_and_plain_text(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('text\ttext_pair\tlabel\na "b\tc\t2.5\n')
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    assert read_labelled(tmp_path / "x.tsv", pairs=True, labels=True) == [Labelled(2, 'a "b', "c", 2.5)]
    assert read_labelled(tmp_path / "x.txt", pairs=False, labels=False) == [Labelled(1, "one"), Labelled(3, "two")]


RECIPE = """
model: {{dimensions: {{batch: 1, sequence: [1, 4, 8]}}}}
passes: [eliminate-identity]
target: {{kind: onnx}}
verify: {{on_failure: {}, task: {{metric: accuracy, data: labelled.tsv, max_drop: 0.1}}}}
"""


def test_a_compile_measures_the_task_and_keeps_its_limit(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> g {CLASSIFIER}'), tokenizer / "m.onnx")
    (tokenizer / "labelled.tsv").write_text("text\tlabel\na\t0\nb\t1\nc\t2\n")
    recipe = tokenizer / "recipe.yaml"
    recipe.write_text(RECIPE.format("fail"))
    report = run_compile(str(tokenizer / "m.onnx"), recipe, tokenizer / "out", tokenizer=tokenizer)
    assert report.verification is not None
    assert report.verification.task is not None
    assert (report.verification.task.source, report.verification.task.compiled) == (1, 1)
    values = iter([1.0, 0.5] * 3)
    monkeypatch.setattr(Task, "measure", lambda *_: next(values))
    with pytest.raises(BudgetError, match=r"accuracy went from 1 to 0\.5: it loses 0\.5, 0\.1 may") as caught:
        run_compile(str(tokenizer / "m.onnx"), recipe, tokenizer / "worse", tokenizer=tokenizer)
    assert not (tokenizer / "worse").exists()
    check_artifact(tokenizer / "worse.failed")
    kept = json.loads((tokenizer / "worse.failed/report.json").read_text())
    assert (kept["status"], kept["verification"]["task"]["drop"]) == ("over budget", 0.5)
    (tokenizer / "labelled.tsv").rename(tokenizer / "elsewhere.tsv")
    again = shlex.split(str(caught.value).splitlines()[-1])
    with pytest.raises(BudgetError, match=r"accuracy went from 1 to 0\.5"):
        app(again[1:], standalone_mode=False)
    (tokenizer / "elsewhere.tsv").rename(tokenizer / "labelled.tsv")
    recipe.write_text(RECIPE.format("warn"))
    warned = run_compile(str(tokenizer / "m.onnx"), recipe, tokenizer / "worse", tokenizer=tokenizer)
    assert any("accuracy went from 1 to 0.5" in warning for warning in warned.warnings)
