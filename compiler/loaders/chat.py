"""Chat templates: how a model was trained to be asked."""

from __future__ import annotations

from pathlib import Path

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.quiet import quiet


def as_chat(folder: Path, prompt: str) -> str:
    """`prompt` as a user's message, by the template that the tokenizer in `folder` has. Raises LlmcError."""
    try:
        with quiet():
            from transformers import AutoTokenizer
    except ImportError as error:
        raise LlmcError(
            "transformers applies the model's chat template: pip install 'llmc-compiler[hf]', or add --raw"
        ) from error
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
