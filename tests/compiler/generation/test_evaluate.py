"""`llmc eval`: perplexity as torch computes it, and the distance of a decoder from its source."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
import transformers

from llmc.compiler.generation.evaluate import evaluate
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.errors import LlmcError

WINDOW = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(str(json.__doc__).split()) * 2, encoding="utf-8")
    return path


def torch_perplexity(checkpoint: Path, text: Path) -> tuple[float, int]:
    """torch's own cross entropy over the same windows, and how many tokens it predicted."""
    with quiet(), torch.inference_mode():
        model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
        nats, count = 0.0, 0
        for piece in ids.split(WINDOW, dim=1):
            if piece.shape[1] > 1:
                nats += float(model(piece, labels=piece).loss) * (piece.shape[1] - 1)
                count += piece.shape[1] - 1
    return math.exp(nats / count), count


def test_perplexity_is_that_of_torch(checkpoint: Path, artifact: Path, text: Path) -> None:
    expected, count = torch_perplexity(checkpoint, text)
    found = evaluate(artifact, text, window=WINDOW)
    assert found.tokens == count > 300
    # Logits differ by some 1e-5 (float32 in another order), and so at most do the logarithms of probabilities.
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert found.against is None


@pytest.mark.slow
def test_against_the_source(checkpoint: Path, artifact: Path, text: Path) -> None:
    other = evaluate(artifact, text, window=WINDOW, against=str(checkpoint)).against
    assert other is not None
    assert (other.model, other.top1_agreement, other.same_answers, other.answers) == ("tiny_llama", 1.0, 8, 8)
    assert 0 <= other.kl_divergence < 1e-8  # the square of what logits differ by


def test_against_another_model(artifact: Path, text: Path, tmp_path: Path) -> None:
    """Without its first norm's weights the source predicts something else."""
    model = onnx.load(artifact / "model.onnx")
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 0 + 1, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    command = [sys.executable, "-m", "llmc.compiler", "eval", str(artifact), "--text", str(text), "--json"]
    run = subprocess.run(
        [*command, "--against", str(tmp_path / "model.onnx")], capture_output=True, text=True, check=True
    )
    other = json.loads(run.stdout)["against"]
    assert other["kl_divergence"] > 0.01
    assert other["top1_agreement"] < 1
    assert other["same_answers"] < other["answers"] == 8


def test_texts_that_predict_nothing(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("", encoding="utf-8")
    with pytest.raises(LlmcError, match="has 0 tokens: to predict one takes two"):
        evaluate(artifact, tmp_path / "short.txt")
    with pytest.raises(LlmcError, match="cannot be read as UTF-8 text"):
        evaluate(artifact, tmp_path / "missing.txt")
