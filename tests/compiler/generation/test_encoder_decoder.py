"""An encoder-decoder, compiled: one artifact of two graphs, which answers as transformers does."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from llmc.compiler.artifact import check_artifact
from llmc.compiler.blame import bisect
from llmc.compiler.cache.memory import open_memory
from llmc.compiler.driver import compile as run_compile
from llmc.compiler.errors import TwoGraphsError
from llmc.compiler.explain import explain
from llmc.compiler.generation.evaluate import evaluate
from llmc.compiler.generation.generate import open_generator
from llmc.compiler.inspect import inspect
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.lock import Lock
from llmc.compiler.planning import plan, plans, summary_of
from llmc.compiler.recipe import Recipe
from llmc.compiler.report import ModelReport, Report
from llmc.compiler.targets.engine_header import read
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.errors import LlmcError

TINY_LLAMA = Path(__file__).parents[2] / "assets" / "tiny_llama"
PROMPTS = ["Return the number of", "é", "If the argument is a string, it"]
TOKENS = 32
RECIPE = """
model: {dimensions: {batch: [1, 1, 4], encoder_sequence: [1, 8, 64], past_sequence: [0, 8, 63]}}
passes: [{recipe: optimize}]
target: {kind: onnxruntime}
"""
STATIC = """
model:
  dimensions: {batch: [1, 1, 4], encoder_sequence: [1, 8, 64], sequence: [1, 4, 8], past_sequence: [0, 8, 24]}
passes: [{recipe: optimize}, scatter-kv-cache: {length: 32}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer: Any = Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
    config = transformers.BartConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=32, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=64, decoder_start_token_id=2, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(1)
    with quiet():
        model = transformers.BartForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, 0.5)
        model.generation_config.forced_bos_token_id = 5
        model.generation_config.forced_eos_token_id = None  # which would cut answers off where this test ends
        model.save_pretrained(folder)
    shutil.copyfile(TINY_LLAMA / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    lock = Lock.of(str(folder / "r.yaml"), str(checkpoint))
    return folder, run_compile(str(checkpoint), Recipe.load(folder / "r.yaml"), folder / "out", lock=lock)


def llmc(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line, run."""
    command = [sys.executable, "-m", "llmc.compiler", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def expected_answers(checkpoint: Path, prompts: list[str]) -> list[str]:
    tokenizer: Any = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    with quiet(), torch.inference_mode():
        model = transformers.BartForConditionalGeneration.from_pretrained(checkpoint).eval()
        found = model.generate(ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=TOKENS + 1)
    answers = []
    for row in found[:, 2:].tolist():  # behind the start token and the forced one
        end = row.index(3) if 3 in row else len(row)
        answers.append(tokenizer.decode(row[:end]))
    return answers


def test_answers_are_those_of_transformers(checkpoint: Path, compiled: tuple[Path, Report]) -> None:
    folder, _ = compiled
    together = expected_answers(checkpoint, PROMPTS)
    assert len(set(together)) > 1
    assert len({letter for answer in together for letter in answer}) > 4, "answers that hardly vary show nothing"
    assert open_generator(folder / "out", limit=TOKENS).answers(PROMPTS) == together
    generator = open_generator(folder / "out", limit=TOKENS)
    assert "".join(generator.stream(PROMPTS[0])) == expected_answers(checkpoint, PROMPTS[:1])[0]


def test_prompts_of_a_file(checkpoint: Path, compiled: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = compiled
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "", ""]), encoding="utf-8")
    asked = ["generate", str(folder / "out"), "--prompts", str(tmp_path / "prompts.txt"), "--tokens", str(TOKENS)]
    done = llmc(*asked, "--json")
    answers = expected_answers(checkpoint, PROMPTS)
    expected = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    assert (json.loads(done.stdout), done.returncode) == (expected, 0)


@pytest.mark.slow
@pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason="TensorRT-RTX is not installed")
def test_engines_of_both(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(STATIC, encoding="utf-8")
    command = ["compile", str(checkpoint), "--recipe", str(tmp_path / "r.yaml"), "--target", "tensorrt-rtx"]
    done = llmc(*command, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for half in ("encoder", "decoder"):
        engine = tmp_path / "out" / half / "model.engine"
        assert read(engine).engine_bytes == engine.stat().st_size
        assert f"{half}/model.engine" in done.stdout
    decoder = onnx.load(tmp_path / "out/decoder/model.onnx").graph
    assert [node.op_type for node in decoder.node].count("TensorScatter") == 2
    assert "past_length" in {value.name for value in decoder.input}
    written = inspect(tmp_path / "out")
    assert isinstance(written, Report)
    assert [graph.status for graph in written.graphs()] == ["done", "done"]


def test_one_artifact_holds_both(compiled: tuple[Path, Report]) -> None:
    folder, report = compiled
    files = check_artifact(folder / "out")
    assert {"encoder/model.onnx", "decoder/model.onnx", "recipe.yaml", "tokenizer/tokenizer.json"} <= set(files)
    encoder, decoder = (onnx.load(folder / "out" / half / "model.onnx").graph for half in ("encoder", "decoder"))
    made = {value.name.removeprefix("present.") for value in encoder.output} - {"last_hidden_state"}
    taken = {value.name.removeprefix("past_key_values.") for value in decoder.input}
    assert made == {name for name in taken if ".encoder." in name} == {"0.encoder.key", "0.encoder.value"}
    assert [graph.source.half for graph in report.graphs()] == ["encoder", "decoder"]
    for graph in report.graphs():
        assert graph.status == "done"
        assert graph.target is not None
        assert {name: (folder / "out" / name).stat().st_size for name in graph.target.files} == graph.target.files
        assert {Path(name).parent.name for name in graph.target.files} == {graph.source.half}
        assert graph.verification is not None
        assert graph.verification.reference == "torch"
        cosines = [n.cosine for step in graph.passes for n in step.numerics if n.cosine is not None]
        assert cosines
        assert min(cosines) > 0.99999  # float32, the same arithmetic in another order
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<h1") == 2


def test_the_lock_covers_both(checkpoint: Path, compiled: tuple[Path, Report]) -> None:
    folder, _ = compiled
    text = (folder / "llmc.lock").read_text(encoding="utf-8")
    assert "encoder/model.onnx" in text
    assert "decoder/model.onnx" in text
    entry = Lock.of(str(folder / "r.yaml"), str(checkpoint), refuses=True)
    recipe = Recipe.load(folder / "r.yaml")
    with pytest.raises(LlmcError, match="to something else"):
        run_compile(str(checkpoint), recipe.with_values({"verify.seed": 7}), folder / "other", lock=entry)


def test_a_dry_run_tells_of_both(checkpoint: Path, compiled: tuple[Path, Report]) -> None:
    folder, _ = compiled
    with open_memory() as memory:
        found = summary_of(plans(str(checkpoint), Recipe.load(folder / "r.yaml"), memory=memory))
    assert list(json.loads(json.dumps(found))) == ["encoder", "decoder"]


def test_data_for_both(checkpoint: Path, compiled: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = compiled
    recipe = Recipe.load(folder / "r.yaml")
    (tmp_path / "lines.txt").write_text("Return the number\n", encoding="utf-8")
    asked = recipe.with_values({"verify.inputs": str(tmp_path / "lines.txt")})
    problem = r"a folder of \.npz files for each graph, encoder/ and decoder/"
    with open_memory() as memory, pytest.raises(LlmcError, match=problem):
        plans(str(checkpoint), asked, memory=memory)


def test_a_task_is_of_one_graph(checkpoint: Path, compiled: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = compiled
    (tmp_path / "labelled.jsonl").write_text("{}\n", encoding="utf-8")
    task = {"metric": "accuracy", "data": str(tmp_path / "labelled.jsonl")}
    recipe = Recipe.load(folder / "r.yaml").with_values({"verify.task": task})
    with pytest.raises(LlmcError, match="a task is measured of one alone"):
        plans(str(checkpoint), recipe)


PAIRS = [("Return the number of", "arguments"), ("é", "If the argument"), ("a", "string, it is one of those")]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Texts and answers to them."""
    lines = [json.dumps({"text": text, "text_pair": answer}) for text, answer in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "pairs.jsonl"


def test_perplexity_of_answers_is_that_of_torch(checkpoint: Path, compiled: tuple[Path, Report], pairs: Path) -> None:
    folder, _ = compiled
    tokenizer: Any = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    nats, count = 0.0, 0
    with quiet(), torch.inference_mode():
        model = transformers.BartForConditionalGeneration.from_pretrained(checkpoint).eval()
        for pair in PAIRS:
            ids, labels = (torch.tensor([tokenizer.encode(text).ids]) for text in pair)
            nats += float(model(input_ids=ids, labels=labels).loss) * labels.shape[1]
            count += labels.shape[1]
    found = evaluate(folder / "out", pairs)
    assert found.tokens == count
    # Logits differ by some 1e-5 (float32 in another order), and so at most do the logarithms of probabilities.
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)


@pytest.mark.slow
def test_against_the_source(checkpoint: Path, compiled: tuple[Path, Report], pairs: Path) -> None:
    folder, _ = compiled
    other = evaluate(folder / "out", pairs, against=str(checkpoint)).against
    assert other is not None
    assert (other.top1_agreement, other.same_answers, other.answers) == (1.0, 3, 3)
    assert 0 <= other.kl_divergence < 1e-8  # the square of what logits differ by
    with pytest.raises(LlmcError, match="not the same kind: one alone is an encoder-decoder"):
        evaluate(folder / "out", pairs, against=str(TINY_LLAMA))


def test_what_cannot_be_evaluated(compiled: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = compiled
    (tmp_path / "text.txt").write_text("Return", encoding="utf-8")
    with pytest.raises(LlmcError, match=r"give a .jsonl or .tsv file with text, and text_pair, its answer"):
        evaluate(folder / "out", tmp_path / "text.txt")
    (tmp_path / "pairs.tsv").write_text("text\ttext_pair\nReturn\tit\n", encoding="utf-8")
    with pytest.raises(LlmcError, match="not the same kind: one alone is an encoder-decoder"):
        evaluate(folder / "out", tmp_path / "pairs.tsv", against=str(TINY_LLAMA))


@pytest.mark.slow
def test_explain_tells_of_both(checkpoint: Path) -> None:
    both = explain(str(checkpoint), "fuse-attention", Recipe.load("optimize"))
    assert [found.half for found in both] == ["encoder", "decoder"]
    chosen = Recipe.load("optimize").with_values({"model.half": "decoder", "model.opset": 20})
    (alone,) = explain(str(checkpoint), "fuse-attention", chosen)
    assert alone.half == "decoder"
    assert alone.result.rewrites


@pytest.mark.slow
def test_bisect_takes_one_of_both(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TwoGraphsError, match=r"with --set model\.half=decoder"):
        plan(str(checkpoint), Recipe.load("optimize"))
    made = plan(str(checkpoint), Recipe.load("optimize").with_values({"model.half": "decoder", "verify.samples": 2}))
    assert bisect(made, tmp_path / "blame").status == "holds"


def test_inspect_shows_both(compiled: tuple[Path, Report]) -> None:
    folder, _ = compiled
    found = inspect(folder / "out")
    assert isinstance(found, Report)
    assert [graph.source.half for graph in found.graphs()] == ["encoder", "decoder"]
    assert isinstance(inspect(folder / "out" / "decoder"), ModelReport)


def test_what_reads_no_text(compiled: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = compiled
    shutil.copytree(folder / "out", tmp_path / "out")
    model = onnx.load(tmp_path / "out/encoder/model.onnx")
    for value in model.graph.input:
        value.name = value.name.replace("input_ids", "input_features")
    for node in model.graph.node:
        node.input[:] = [name.replace("input_ids", "input_features") for name in node.input]
    onnx.save(model, tmp_path / "out/encoder/model.onnx")
    with pytest.raises(LlmcError, match="reads input_features, not text: give --input FILE"):
        open_generator(tmp_path / "out").answers(PROMPTS)
