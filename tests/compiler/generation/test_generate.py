"""`llmc generate`: a compiled decoder answers as transformers does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from llmc.compiler.generation.generate import open_generator, read_prompts
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.errors import LlmcError

PROMPTS = ["Return the number of", "é", "If the argument is a string, it"]


def expected_answers(checkpoint: Path, prompts: list[str], tokens: int) -> list[str]:
    """What transformers answers to each prompt by itself."""
    tokenizer: Any = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    with quiet(), torch.inference_mode():
        model = transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
        answers = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer.encode(prompt).ids])
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=1
            )
            answer = [token for token in found[0, ids.shape[1] :].tolist() if token != 0]
            answers.append(tokenizer.decode(answer))
    return answers


def test_answers_are_those_of_transformers(checkpoint: Path, artifact: Path) -> None:
    expected = expected_answers(checkpoint, PROMPTS, 24)
    assert len(set(expected)) == 3
    assert open_generator(artifact, limit=24).answers(PROMPTS) == expected
    generator = open_generator(artifact, limit=24)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert ["".join(generator.stream(prompt)) for prompt in PROMPTS] == expected
    assert generator.speed.prompt_tokens == sum(len(tokenizer.encode(prompt).ids) for prompt in PROMPTS)


def test_command(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    command = [sys.executable, "-m", "llmc.compiler", "generate", str(artifact), "--tokens", "5"]
    one = subprocess.run([*command, "--prompt", PROMPTS[0]], capture_output=True, text=True, check=True)
    assert one.stdout == expected_answers(checkpoint, PROMPTS[:1], 5)[0] + "\n"
    assert "tokens/s" in one.stderr
    many = subprocess.run(
        [*command, "--prompts", str(tmp_path / "prompts.txt"), "--json"], capture_output=True, text=True, check=True
    )
    assert [line["answer"] for line in json.loads(many.stdout)] == expected_answers(checkpoint, PROMPTS, 5)


def test_what_cannot_generate(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"model.onnx does not exist; give an artifact"):
        open_generator(tmp_path)
    with pytest.raises(LlmcError, match="give --tokenizer DIR"):
        open_generator(artifact, tokenizer=tmp_path)
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(LlmcError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt")


def test_characters_of_several_tokens_come_whole(artifact: Path) -> None:
    tokenizer = open_generator(artifact).tokenizer
    tokens = tokenizer.encode("\N{GREEK SMALL LETTER OMEGA}\N{SNOWMAN}", chat=False)
    assert len(tokens) > 2
    pieces = [piece for piece in tokenizer.stream(iter(tokens)) if piece]
    assert pieces == ["\N{GREEK SMALL LETTER OMEGA}", "\N{SNOWMAN}"]


def test_prompts_of_a_chat_model_go_through_its_template(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(artifact / "tokenizer", folder)
    template = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[answer]"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}), encoding="utf-8"
    )
    chat = open_generator(artifact, tokenizer=folder, limit=8)
    plain = open_generator(artifact, limit=8)
    assert not plain.tokenizer.has_chat
    assert chat.answers(["hi"]) == plain.answers(["[user]hi[answer]"])
    assert open_generator(artifact, tokenizer=folder, limit=8, raw=True).answers(["hi"]) == plain.answers(["hi"])
