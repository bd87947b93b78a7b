"""Every command of the README runs, as it stands there, on files of the names that it uses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip() for language, block in BLOCKS if language == "sh" for line in block.splitlines()
]

MODEL = """<ir_version: 10, opset_import: ["": 20]>
g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask, int64[batch,sequence] token_type_ids)
=> (float[batch,sequence,4] y) {
  words = Gather(table, input_ids)
  kinds = Gather(kindtable, token_type_ids)
  h = Add(words, kinds)
  m = Cast<to=1>(attention_mask)
  axis = Constant<value_ints=[2]>()
  mask = Unsqueeze(m, axis)
  p = MatMul(h, w)
  y = Mul(p, mask)
}"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with everything that the README's commands name."""
    from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    weights = {"table": (64, 4), "kindtable": (2, 4), "w": (4, 4)}
    model = onnx.parser.parse_model(MODEL)
    for name, shape in weights.items():
        tensor = onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        model.graph.initializer.append(tensor)
    onnx.save(model, folder / "model.onnx")
    (folder / "hf-dir").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / "hf-dir")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, vocab_size=64, max_position_embeddings=512)).save_pretrained(folder / "hf-dir")
    (folder / "texts.txt").write_text("\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(40)), encoding="utf-8")
    (folder / "samples").mkdir()
    names = ("input_ids", "attention_mask", "token_type_ids")
    np.savez(folder / "samples/0.npz", **{name: np.ones((2, 8), np.int64) for name in names})
    (folder / "configs").symlink_to(ROOT / "configs")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024)).save_pretrained(folder / "llama-dir")
    (folder / "llama-dir/tokenizer.json").symlink_to(ROOT / "tests/assets/tiny_llama/tokenizer.json")
    return folder


def run(command: str, place: Path) -> None:
    # One cache of all commands here, so that hf-dir is exported once; but for the command that would empty it.
    cache = place / ("emptied" if command == "llmc cache clear" else "cache")
    environment = {
        **os.environ,
        "LLMC_CACHE": str(cache),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        shlex.split(command), cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_commands_of_the_readme(place: Path) -> None:
    """In order, for a later one may use what an earlier one made. `make` and `pip` are only looked up: CI runs them."""
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if program == "make":
            run(f"make -C {ROOT} --dry-run {' '.join(words)}", place)
        elif program == "pip":
            extras = set(re.findall(r"\[(.*)\]", command)[0].split(","))
            assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
        else:
            run(command, place)


def test_the_recipe_of_the_readme(place: Path) -> None:
    (recipe,) = (block for language, block in BLOCKS if language == "yaml")
    (place / "readme.yaml").write_text(recipe, encoding="utf-8")
    run("llmc recipe check readme.yaml", place)


def test_the_python_of_the_readme(place: Path) -> None:
    (code,) = (block for language, block in BLOCKS if language == "python")
    (place / "readme.py").write_text(code, encoding="utf-8")
    run(f"{sys.executable} readme.py", place)


SLOW_RECIPES = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("fp16", "optimize", "bf16", "int4", "nvfp4", "onnx-int8")
]


@pytest.mark.parametrize("recipe", ["int8", "fp8", *SLOW_RECIPES])
def test_every_shipped_recipe_builds_an_engine(recipe: str, place: Path) -> None:
    """The two for MiniLM are in test_minilm.py, fp16 is in the README."""
    texts = "--calibration texts.txt" if recipe[-1] in "48" else "--verify-inputs texts.txt"
    run(f"llmc compile hf-dir --recipe {recipe} {texts} --target tensorrt-rtx -o build/shipped-{recipe}", place)
    assert (place / f"build/shipped-{recipe}/model.engine").stat().st_size > 0


def test_the_shipped_recipes_for_onnx_runtime_build(place: Path) -> None:
    run("llmc compile hf-dir --recipe onnxruntime-int8 --verify-inputs texts.txt -o build/shipped-cpu", place)
    assert (place / "build/shipped-cpu/model.onnx").stat().st_size > 0
    static = "build/shipped-cpu-static"
    run(f"llmc compile hf-dir --recipe onnxruntime-int8-static --calibration texts.txt -o {static}", place)
    operators = {node.op_type for node in onnx.load(place / static / "model.onnx").graph.node}
    assert "MatMulIntegerToFloat" in operators
    run("llmc compile hf-dir --recipe onnxruntime-int4 --calibration texts.txt -o build/shipped-cpu-int4", place)
    operators = {node.op_type for node in onnx.load(place / "build/shipped-cpu-int4/model.onnx").graph.node}
    assert "MatMulNBits" in operators


def test_no_shipped_recipe_is_left_out() -> None:
    engines = {"optimize", "fp16", "bf16", "int8", "fp8", "int4", "nvfp4", "onnx-int8", "minilm-fp16", "minilm-int8"}
    others = {"onnxruntime-int8", "onnxruntime-int8-static", "onnxruntime-int4"}
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == engines | others
