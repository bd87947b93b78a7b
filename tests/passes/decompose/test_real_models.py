"""Models as tools write them: ONNX Runtime's transformer optimizer, its session optimizer and its quantizers."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.decompose.decompose_contrib import DecomposeContrib
from llmc.passes.decompose.decompose_quantized import DecomposeQuantized
from llmc.passes.graph import Array, Graph, load_model, to_model
from llmc.passes.precision.fold_qdq import FoldQdq

TOLERANCE = 2e-5
"""float32 sums in another order, through two layers."""
LAYERS, HEADS, HIDDEN, WORDS, LENGTH = 2, 2, 16, 50, 7


def export(model: Any, arguments: tuple[Any, ...], names: list[str], path: Path) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            arguments,
            path,
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["y"],
            dynamic_axes={name: {0: "B", 1: "S"} for name in names},
        )
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small layers with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=2 * HIDDEN,
            max_position_embeddings=20,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state

    ids = torch.randint(0, WORDS, (2, LENGTH))
    arguments = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    return export(Encoder(), arguments, names, tmp_path_factory.mktemp("bert") / "model.onnx")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two small layers with random weights."""
    import torch
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(
        GPT2Config(
            vocab_size=WORDS,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=20,
            attn_implementation="eager",
        )
    )

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any) -> Any:
            length = ids.shape[1]
            later = torch.ones(length, length).triu(1).bool()
            return self.model(
                input_ids=ids,
                use_cache=False,
                position_ids=torch.arange(length)[None],
                attention_mask=torch.zeros(1, 1, length, length).masked_fill(later, -1e4),
            ).last_hidden_state

    ids = torch.randint(0, WORDS, (2, LENGTH))
    return export(Decoder(), (ids,), ["input_ids"], tmp_path_factory.mktemp("gpt2") / "model.onnx")


def feeds_for(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    mask = np.array([[1] * LENGTH, [1] * 5 + [0] * 2])
    known = {"attention_mask": mask, "token_type_ids": rng.integers(0, 2, (2, LENGTH))}
    made = {t.name: known.get(t.name, rng.integers(0, WORDS, (2, LENGTH))) for t in graph.inputs}
    return {t.name: made[t.name].astype(t.dtype) for t in graph.inputs}


def contrib(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes if node.domain)


def optimized(path: Path, family: str, folder: Path) -> Graph:
    """What `onnxruntime.transformers.optimizer` makes of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from onnxruntime.transformers.optimizer import optimize_model

            model = optimize_model(str(path), model_type=family, num_heads=HEADS, hidden_size=HIDDEN, opt_level=0)
            model.save_model_to_file(str(folder / "optimized.onnx"))
        finally:
            logging.disable(logging.NOTSET)
    return load_model(folder / "optimized.onnx")


def decomposes(graph: Graph, feeds: dict[str, Array], *passes: Any) -> Counter[str]:
    """Run the passes, compare, and count operators."""
    before = Session(graph).run(feeds)
    for one in passes:
        result = one().run(graph, Context())
        assert result.near_misses == []
    assert contrib(graph) == Counter()
    onnx.checker.check_model(to_model(graph))
    after = Session(graph).run(feeds)
    for name, expected in before.items():
        assert np.allclose(after[name], expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max()))
    return Counter(node.op for node in graph.nodes)


def test_bert_from_the_transformer_optimizer(bert: Path, tmp_path: Path) -> None:
    graph = optimized(bert, "bert", tmp_path)
    assert contrib(graph) == {
        "EmbedLayerNormalization": 1,
        "Attention": LAYERS,
        "SkipLayerNormalization": 2 * LAYERS,
        "BiasGelu": LAYERS,
    }
    count = decomposes(graph, feeds_for(graph), DecomposeContrib)
    assert (count["Attention"], count["LayerNormalization"], count["Gelu"]) == (LAYERS, 2 * LAYERS + 1, LAYERS)


def test_gpt2_from_the_transformer_optimizer(gpt2: Path, tmp_path: Path) -> None:
    graph = optimized(gpt2, "gpt2", tmp_path)
    assert contrib(graph) == {"SkipLayerNormalization": 2 * LAYERS, "FastGelu": LAYERS}
    count = decomposes(graph, feeds_for(graph), DecomposeContrib)
    assert (count["LayerNormalization"], count["Gelu"]) == (2 * LAYERS + 1, LAYERS)


def test_bert_from_the_session_optimizer(bert: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(bert), options, providers=["CPUExecutionProvider"])
    graph = load_model(tmp_path / "optimized.onnx")
    assert contrib(graph)["BiasGelu"] == LAYERS
    decomposes(graph, feeds_for(graph), DecomposeContrib)


def test_bert_quantized_dynamically(bert: Path, tmp_path: Path) -> None:
    """DynamicQuantizeLinear and MatMulInteger: the same levels, by floating-point operators alone."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(str(bert), str(tmp_path / "quantized.onnx"), weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    graph = load_model(tmp_path / "quantized.onnx")
    assert Counter(node.op for node in graph.nodes)["MatMulInteger"] == 6 * LAYERS
    count = decomposes(graph, feeds_for(graph), DecomposeQuantized)
    assert not {"MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear"} & set(count)


CNN = (
    '<ir_version: 10, opset_import: ["": 17]> g (float[N,3,8,8] x) => (float[N,5] y) {'
    " a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, W1, B1) b = Relu(a)"
    " c = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b) d = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(c, W2, B2)"
    " e = Add(c, d) f = GlobalAveragePool(e) h = Flatten(f) y = Gemm<transB=1>(h, W3, B3) }"
)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, rng = onnx.parser.parse_model(CNN), np.random.default_rng(0)
    shapes = {"W1": (8, 3, 3, 3), "B1": (8,), "W2": (8, 8, 3, 3), "B2": (8,), "W3": (5, 8), "B3": (5,)}
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) / 4).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    path = tmp_path_factory.mktemp("cnn") / "model.onnx"
    onnx.save(model, path)
    return path


def quantized(path: Path, folder: Path, form: str, **options: Any) -> Graph:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # no types
        def __init__(self) -> None:
            rng = np.random.default_rng(1)
            self.left = [{"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(4)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    logging.disable(logging.WARNING)
    try:
        target = folder / "quantized.onnx"
        quantize_static(str(path), str(target), Reader(), quant_format=getattr(QuantFormat, form), **options)
    finally:
        logging.disable(logging.NOTSET)
    return load_model(folder / "quantized.onnx")


X = {"x": np.random.default_rng(2).standard_normal((3, 3, 8, 8)).astype(np.float32)}


def test_a_cnn_of_quantized_operators(cnn: Path, tmp_path: Path) -> None:
    graph = quantized(cnn, tmp_path, "QOperator")
    operators = Counter(node.op for node in graph.nodes)
    assert operators["QLinearConv"] == 2
    assert operators["QLinearAdd"] == 1
    before = Session(graph).run(X)["y"]
    scale = [n for n in graph.nodes if n.op == "DequantizeLinear"][-1].inputs[1].values
    for one in (DecomposeQuantized, FoldQdq):
        one().run(graph, Context())
    assert contrib(graph) == Counter()
    assert not any(node.op.startswith("QLinear") for node in graph.nodes)
    # Each of five requantizations may be a level off; together they moved the output by two of its levels at most.
    assert np.abs(Session(graph).run(X)["y"] - before).max() <= 2.01 * scale


def test_a_cnn_with_pairs(cnn: Path, tmp_path: Path) -> None:
    """Symmetric, as ONNX Runtime advises for TensorRT: nothing is left that TensorRT refuses."""
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    graph = quantized(cnn, tmp_path, "QDQ", extra_options=symmetric, per_channel=True)
    before = Session(graph).run(X)["y"]
    result = FoldQdq().run(graph, Context())
    assert Counter(r.rule for r in result.rewrites)["bias"] == 3
    assert result.warnings == []
    assert np.array_equal(Session(graph).run(X)["y"], before)
    types = {n.inputs[2].dtype for n in graph.nodes if n.op in ("QuantizeLinear", "DequantizeLinear")}
    assert types == {np.dtype(np.int8)}
