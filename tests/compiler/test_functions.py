"""Functions of the user's own: how they are found, and samples that one yields."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from typer.testing import CliRunner

from llmc.compiler.cli import app
from llmc.compiler.data import from_path
from llmc.compiler.errors import LlmcError
from llmc.compiler.functions import code_of, is_function, load_function
from llmc.compiler.recipe.sections import CustomMetric
from llmc.compiler.verification.custom import load_custom
from llmc.passes.graph import Graph

GraphParser = Callable[..., Graph]
GRAPH = "(float[batch,2] a, int64[batch] b) => (float[batch,2] y) { y = Relu(a) }"
DATA = """
import itertools
import numpy as np
from beside import ROWS


def samples():
    for number in range(3):
        yield {"a": np.full((ROWS, 2), number, np.float16), "b": np.arange(ROWS), "label": "ignored"}


def endless():
    for number in itertools.count():
        yield {"a": np.full((1, 2), number, np.float32), "b": np.array([number])}


def listed():
    return [{"a": np.ones((1, 2), np.float32), "b": np.zeros(1, np.int64)}]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data.py, and a module that it imports."""
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "beside.py").write_text("ROWS = 2\n")
    for name in ("beside", "data", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("named", ["data.py:listed", "data:listed"])
def test_a_function_is_found_in_a_file_and_in_a_module(named: str, mine: Path) -> None:
    before = list(sys.path)
    function = load_function(named, mine, "here")
    assert function()[0]["b"].tolist() == [0]
    assert sys.path == before
    assert load_custom({"m": CustomMetric(function=named)}, mine)["m"].__code__ == function.__code__


def test_a_file_is_read_anew_each_time(mine: Path) -> None:
    (mine / "counts.py").write_text("def f(): return 1\n")
    first = load_function("counts.py:f", mine, "here")
    digest = code_of(first)
    (mine / "counts.py").write_text("def f(): return 22\n")
    assert (first(), load_function("counts.py:f", mine, "here")()) == (1, 22)
    assert code_of(load_function("counts.py:f", mine, "here")) != digest


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("gone.py:f", r"here: there is no .*gone\.py"),
        ("data.py:f", "here: 'data.py:f' cannot be imported: AttributeError: .*no attribute 'f'"),
        ("data.py:ROWS", "here: 'data.py:ROWS' is no function"),
        ("no_such_module:f", "here: 'no_such_module:f' cannot be imported: ModuleNotFoundError: No module named"),
        ("broken.py:f", r"cannot be imported: ZeroDivisionError: .* \(broken\.py, line 2\)"),
        ("wrong.py:f", r"cannot be imported: SyntaxError"),
    ],
)
def test_what_cannot_be_imported(named: str, reason: str, mine: Path) -> None:
    (mine / "broken.py").write_text("x = 1\ny = x / 0\n")
    (mine / "wrong.py").write_text("def f(:\n")
    with pytest.raises(LlmcError, match=reason):
        load_function(named, mine, "here")


def test_what_is_a_function(mine: Path) -> None:
    assert is_function(mine / "data.py:samples")
    assert is_function(mine / "package.data:samples")
    assert not is_function(mine / "data.py")
    assert not is_function(mine / "a b:samples")
    (mine / "text:samples").write_text("a file after all")
    assert not is_function(mine / "text:samples")


# Samples


def test_samples_that_a_function_yields(mine: Path, parse: GraphParser) -> None:
    samples = from_path(mine / "data.py:samples", parse(GRAPH))
    assert (samples.name, len(samples), samples.random) == ("data.py:samples", 3, False)
    for _ in range(2):
        found = list(samples)
        assert [sample["a"].tolist() for sample in found] == [[[float(n)] * 2] * 2 for n in range(3)]
        assert {array.dtype.name for sample in found for array in sample.values()} == {"float32", "int64"}
        assert {tuple(sample) for sample in found} == {("a", "b")}
    assert [sample["a"][0, 0] for sample in samples.first(2)] == [0, 1]
    assert [len(from_path(mine / "data.py:endless", parse(GRAPH), count=count)) for count in (1, 5)] == [1, 5]
    assert len(from_path(mine / "data:listed", parse(GRAPH), count=5)) == 1


def test_the_digest_covers_the_file_and_the_values(mine: Path, parse: GraphParser) -> None:
    def digest(count: int = 3) -> str:
        for name in ("beside", "data"):
            sys.modules.pop(name, None)
        return from_path(mine / "data.py:samples", parse(GRAPH), count=count).digest

    seen = [digest(), digest(count=2)]
    assert digest() == seen[0]
    (mine / "beside.py").write_text("ROWS = 1  # of other samples\n")
    seen.append(digest())
    (mine / "data.py").write_text(DATA + "\n")
    seen.append(digest())
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("yield 3", r"data\.py:f, sample 1 is int: yield dicts"),
        ("yield {'a': np.ones((1, 2), np.float32)}", r"data\.py:f, sample 1 has no array 'b'.*; it has: a"),
        ("yield {'a': np.ones((1, 2)), 'b': np.zeros(1, np.int64)}", "array 'a' is float64, the model takes float32"),
        ("yield {'a': np.ones((1, 3), np.float32), 'b': np.zeros(1, np.int64)}", "axis 1 must be 2"),
        ("yield {'a': np.ones((2, 2), np.float32), 'b': np.zeros(1, np.int64)}", "'batch' is 1, but 2 in array 'a'"),
        ("yield {'a': object(), 'b': np.zeros(1)}", "sample 1: 'a' is object, no array of numbers"),
        ("raise ValueError('no rows')\n    yield", r"data\.py:f failed: ValueError: no rows \(data\.py, line 5\)"),
        ("return ()", r"data\.py:f yields no samples"),
        ("return None", "failed: TypeError: 'NoneType' object is not iterable"),
        ("return iter(3)", "failed: TypeError: 'int' object is not iterable"),
        (
            "yield {'a': np.ones((1, 2), np.float32), 'b': np.zeros(1, np.int64)}\n    yield {'a': 1}",
            "sample 2 has no array 'b'",
        ),
    ],
)
def test_what_does_not_fit(body: str, reason: str, mine: Path, parse: GraphParser) -> None:
    (mine / "data.py").write_text(f"import numpy as np\n\n\ndef f():\n    {body}\n")
    with pytest.raises(LlmcError, match=reason):
        from_path(mine / "data.py:f", parse(GRAPH))


def test_samples_must_be_the_same_each_time(mine: Path, parse: GraphParser) -> None:
    (mine / "data.py").write_text(
        "import numpy as np\nstate = {'left': 4}\n\n\ndef random():\n"
        "    yield {'a': np.random.default_rng().random((1, 2), np.float32), 'b': np.zeros(1, np.int64)}\n\n\n"
        "def used_up():\n    while state['left']:\n        state['left'] -= 1\n"
        "        yield {'a': np.ones((1, 2), np.float32), 'b': np.zeros(1, np.int64)}\n"
    )
    with pytest.raises(LlmcError, match=r"data\.py:random, sample 1 is not what it was before.*seed what is random"):
        list(from_path(mine / "data.py:random", parse(GRAPH)))
    with pytest.raises(LlmcError, match=r"data\.py:used_up yielded 4 samples, and called again 0"):
        list(from_path(mine / "data.py:used_up", parse(GRAPH)))


MODEL = """<ir_version: 10, opset_import: ["": 20]>
g (float[batch,8] x) => (float[batch,8] y) { p = MatMul(x, w) y = Relu(p) }"""
RECIPE = """
model: {dimensions: {batch: [1, 2, 8]}}
passes: [quantize-int8: {calibration: {data: "data.py:many", samples: 6}}]
target: {kind: onnx}
verify: {inputs: "data.py:many", samples: 2, custom: {ratio: {function: "data.py:ratio", at_most: 2}}}
"""
MANY = """
import numpy as np


def many():
    rng = np.random.default_rng(0)
    while True:
        yield {"x": rng.standard_normal((2, 8), np.float32)}


def ratio(expected, found):
    return float(np.abs(found).max() / np.abs(expected).max())
"""


def test_a_compile_on_a_function(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(MODEL)
    values = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "data.py").write_text(MANY)

    def compiled(output: str, *words: str) -> dict[str, Any]:
        given = [tmp_path / "model.onnx", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / output]
        CliRunner().invoke(app, ["compile", *map(str, given), *words], catch_exceptions=False)
        found: dict[str, Any] = json.loads((tmp_path / output / "report.json").read_bytes())
        return found

    report = compiled("out", "--lock")
    assert (report["verification"]["inputs"], report["verification"]["samples"]) == ("data.py:many", 2)
    assert report["passes"][-1]["numerics"][0]["custom"].keys() == {"ratio"}
    section = json.loads((tmp_path / "out/calibration.json").read_bytes())["passes"][0]
    rng = np.random.default_rng(0)
    peak = max(float(np.abs(rng.standard_normal((2, 8), np.float32)).max()) for _ in range(6))
    assert (section["tensors"]["x"]["amax"], section["tensors"]["x"]["samples"]) == (peak, 6)
    words = ("--calibration", str(tmp_path / "data.py:many"))  # as the recipe has it
    assert compiled("again", "--locked", *words)["timings"]["cached"] != []
    (tmp_path / "data.py").write_text(MANY + "# changed\n")
    with pytest.raises(LlmcError, match=r"calibration\.quantize-int8\.sha256: locked"):
        compiled("third", "--locked")
    (tmp_path / "data.py").unlink()
    with pytest.raises(LlmcError, match=r"there is no .*data\.py"):
        compiled("fourth")
