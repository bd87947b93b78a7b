"""What each precision costs a trained language model, on text that it has not seen. docs/perplexity.md is made anew by

pytest tests/test_perplexity.py -m "" --perplexity
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.data.text import is_past
from llmc.compiler.loaders import load
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.passes.base import Context, Pass, Skip
from llmc.passes.cache.quantize_kv_cache import QuantizeKvCache
from llmc.passes.graph import Array, Graph, constant_bytes, constants, copy_graph
from llmc.passes.precision.convert_bf16 import ConvertBf16
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.quantize_dynamic import QuantizeDynamic
from llmc.passes.precision.quantize_fp8 import QuantizeFp8
from llmc.passes.precision.quantize_int8 import QuantizeInt8
from llmc.passes.precision.quantize_mxfp8 import QuantizeMxfp8
from llmc.passes.precision.quantize_nvfp4 import QuantizeNvfp4
from llmc.passes.precision.quantize_weights import QuantizeWeights
from llmc.passes.precision.share_weights import ShareWeights
from llmc.passes.precision.smooth_quant import SmoothQuant

TABLE = Path(__file__).parent.parent / "docs" / "perplexity.md"
SAMPLES = 128
METHODS: dict[str, Sequence[Pass]] = {
    "float32": [],
    "FP16": [ConvertFp16()],
    "BF16": [ConvertBf16()],
    "INT8, bias not corrected": [QuantizeInt8(correct_bias=False)],
    "INT8": [QuantizeInt8()],
    "INT8, SmoothQuant": [SmoothQuant(), QuantizeInt8()],
    "INT8, dynamic": [QuantizeDynamic()],
    "INT8 cache": [QuantizeKvCache()],
    "INT8 cache, keys by head": [QuantizeKvCache(keys="head")],
    "INT8, SmoothQuant, INT8 cache": [SmoothQuant(), QuantizeInt8(), QuantizeKvCache()],
    "FP8": [QuantizeFp8()],
    "MXFP8": [QuantizeMxfp8()],
    "NVFP4": [QuantizeNvfp4()],
    "INT8 weights, RTN, per channel": [QuantizeWeights(method="rtn", bits=8, block="channel")],
    "MXFP8 weights": [QuantizeMxfp8(activations=False)],
    "NVFP4 weights": [QuantizeNvfp4(activations=False)],
    "INT4 weights, RTN, 32": [QuantizeWeights(method="rtn", block=32)],
    "INT4 weights, HQQ, 32": [QuantizeWeights(method="hqq", block=32)],
    "INT4 weights, AWQ, 32": [QuantizeWeights(method="awq", block=32)],
    "INT4 weights, GPTQ, 32": [QuantizeWeights(method="gptq", block=32)],
    "INT4 weights, GPTQ, 32, zero points": [QuantizeWeights(method="gptq", block=32, symmetric=False)],
    "shared weights, 4 bits": [ShareWeights()],
    "shared weights, 3 bits": [ShareWeights(bits=3)],
}
"""Name in the table → passes after those of `optimize`."""
BETTER = [
    ("INT8, SmoothQuant", "INT8, bias not corrected"),
    ("INT8 weights, RTN, per channel", "INT8"),
    ("INT8 cache", "INT8 cache, keys by head"),
    ("MXFP8", "NVFP4"),
    ("MXFP8 weights", "MXFP8"),
    ("NVFP4 weights", "NVFP4"),
    ("INT4 weights, HQQ, 32", "INT4 weights, RTN, 32"),
    ("INT4 weights, AWQ, 32", "INT4 weights, RTN, 32"),
    ("INT4 weights, GPTQ, 32", "INT4 weights, RTN, 32"),
    ("INT4 weights, GPTQ, 32, zero points", "INT4 weights, GPTQ, 32"),
    ("INT8 weights, RTN, per channel", "INT4 weights, GPTQ, 32"),
    ("shared weights, 4 bits", "shared weights, 3 bits"),
]
"""What moves the numbers less, by finer levels or by choosing them better, costs less."""
FREE = {"FP16": 0.01, "BF16": 0.25, "INT8 weights, RTN, per channel": 0.25, "INT8 cache": 0.05}
"""Percent of perplexity that may be lost at most: rounding by 2^-11 and by 2^-8 of a value, and by 1/254 of a channel's
largest; some hundred such roundings stand one after another, and are as often up as down. Of keys and values eight in a
row are rounded, and Softmax and the sum take the mean over the tokens."""
APART = 0.2
"""Percent of perplexity that a row may differ by: another processor adds in another order, and a value between two
levels goes to the other."""
HEAD = """# What each precision costs a trained language model

Perplexity of the model in tests/assets (Llama shape, 0.9 M parameters) on text held out from its training, in windows
of 256 tokens, run in ONNX Runtime with the roundings of a GPU; calibrated on 128 windows of its training text. The
passes of `optimize` come first. With an INT8 cache the graph keeps 512 bytes a token in place of 2048, and each window
goes through it as one prompt whose tokens see one another quantized. [weight-only.md](weight-only.md) has more of INT4,
and other quantizers. Made by

```
pytest tests/test_perplexity.py -m "" --perplexity
```

| Method | Perplexity | More than float32 | MB |
|---|---|---|---|
"""


def recorded() -> dict[str, tuple[float, float]]:
    """Method → perplexity, and percent more than float32's, as the table has them."""
    found = re.findall(r"^\| (.+) \| ([\d.]+) \| (-?[\d.]+) % \| [\d.]+ \|$", TABLE.read_text("utf-8"), re.MULTILINE)
    return {name: (float(value), float(more)) for name, value, more in found}


@pytest.fixture(scope="module")
def language_model(tiny_llama: Path) -> Graph:
    return optimized(tiny_llama, "none")


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path) -> Graph:
    """The same with a cache."""
    return optimized(tiny_llama, "growing")


def optimized(folder: Path, cache: Literal["none", "growing"]) -> Graph:
    graph = load(str(folder), cache=cache).graph
    for step in Recipe.load("optimize").passes:
        try:
            step.run(graph, Context())
        except Skip:
            continue
    return graph


@pytest.fixture(scope="module")
def samples(tiny_llama: Path, documentation: ModuleType) -> list[dict[str, Array]]:
    found: list[dict[str, Array]] = documentation.samples(tiny_llama, SAMPLES)
    return found


@pytest.fixture(scope="module")
def unseen(tiny_llama: Path, documentation: ModuleType) -> list[Array]:
    windows: list[Array] = documentation.windows(documentation.held_out(), tiny_llama)
    return windows


@pytest.fixture(scope="module")
def whole(language_model: Graph, unseen: list[Array], documentation: ModuleType) -> float:
    """Perplexity in float32."""
    return perplexity(language_model, unseen, documentation)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What is found; with --perplexity it takes the place of the same rows in docs/perplexity.md."""
    found: dict[str, str] = {}
    yield found
    if request.config.getoption("--perplexity"):
        lines = TABLE.read_text("utf-8").splitlines() if TABLE.exists() else []
        known = {line.split(" | ")[0].removeprefix("| "): line for line in lines} | found
        TABLE.write_text(HEAD + "".join(f"{known[name]}\n" for name in METHODS if name in known), encoding="utf-8")


def perplexity(graph: Graph, windows: list[Array], documentation: ModuleType) -> float:
    session = Session(graph)
    found: float = documentation.perplexity(lambda feeds: session.run(from_the_start(graph, feeds))["logits"], windows)
    return found


def from_the_start(graph: Graph, feeds: dict[str, Array]) -> dict[str, Array]:
    """Inputs of a decoder, before which there is nothing in the cache; of a graph without one as they are."""
    pasts = [tensor for tensor in graph.inputs if is_past(tensor.name)]
    empty = {tensor.name: np.zeros((1, tensor.shape[1], 0, tensor.shape[3]), tensor.dtype) for tensor in pasts}
    return {**feeds, "position_ids": np.arange(feeds["input_ids"].shape[1])[None], **empty}


def test_the_table_has_every_method() -> None:
    assert list(recorded()) == list(METHODS), f"run {HEAD.split('```')[1].strip()}"
    assert TABLE.read_text(encoding="utf-8").startswith(HEAD)


@pytest.mark.parametrize(("better", "worse"), BETTER)
def test_finer_levels_and_better_methods_cost_less(better: str, worse: str) -> None:
    assert recorded()[better][0] < recorded()[worse][0]


@pytest.mark.parametrize("name", FREE)
def test_what_hardly_rounds_costs_hardly_anything(name: str) -> None:
    assert abs(recorded()[name][1]) <= FREE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_what_is_measured(
    name: str,
    samples: list[dict[str, Array]],
    unseen: list[Array],
    whole: float,
    rows: dict[str, str],
    documentation: ModuleType,
    request: pytest.FixtureRequest,
) -> None:
    cached = any(step.key() == "quantize-kv-cache" for step in METHODS[name])
    graph = copy_graph(request.getfixturevalue("decoder" if cached else "language_model"))
    activations = SampledActivations([from_the_start(graph, sample) for sample in samples])
    for step in METHODS[name]:
        result = step.run(graph, Context(activations=activations))
        made = len(result.rewrites if step.key() == "quantize-kv-cache" else result.asked)
        least = {"smooth-quant": 0, "quantize-kv-cache": 2 * 4}.get(step.key(), 4 * 4)
        assert made >= least, "keys and values, and four products, in each of four layers"
    found = perplexity(graph, unseen, documentation) if METHODS[name] else whole
    size = sum(constant_bytes(constant) for constant in constants(graph)) / 1e6
    more = 100 * (found / whole - 1)
    rows[name] = f"| {name} | {found:.3f} | {more:.2f} % | {size:.2f} |"
    if not request.config.getoption("--perplexity"):
        assert more == pytest.approx(recorded()[name][1], abs=APART)
