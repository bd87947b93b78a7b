"""Caches of decoders. What comes of each family with one: tests/test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import load
from llmc.compiler.loaders.quiet import quiet


def test_state_that_is_no_cache(tmp_path: Path) -> None:
    with quiet():
        config = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
        transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(LlmcError, match=r"set model\.cache to none"):
        load(str(tmp_path))
