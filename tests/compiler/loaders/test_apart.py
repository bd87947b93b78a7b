"""An export in another process makes the graph that one here makes, and however that process ends, llmc says how."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import apart, load
from llmc.compiler.loaders.apart import exporter_apart
from llmc.compiler.loaders.checkpoint import open_checkpoint
from llmc.compiler.loaders.huggingface import _TorchModel
from llmc.compiler.loaders.mapped import PlacedWeights
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.tasks import TEXT_GENERATION
from llmc.compiler.loaders.torch_export import Rung
from llmc.compiler.progress import quiet as silent
from llmc.passes.graph import loaded, to_structure

RUNG = Rung(24, "sdpa")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of one layer, half of it in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[0].mlp.to(torch.bfloat16)
    with quiet():
        model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def source(folder: Path) -> Any:
    return _TorchModel(open_checkpoint(folder), TEXT_GENERATION, None, "growing", None, False, silent)


def test_the_graph_is_the_one_that_this_process_makes(
    folder: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights stay in the model's files; those that are not there so come through a mapped file."""
    asked = list[Any]()

    def spy(given: Any) -> Any:
        asked.append(given)
        return exporter_apart(given)

    here = to_structure(load(str(folder)).graph)
    monkeypatch.setattr(apart, "APART_FROM", 0)
    monkeypatch.setattr(apart, "exporter_apart", spy)
    there = to_structure(load(str(folder)).graph)
    assert asked == [source]
    assert here.model.graph == there.model.graph
    assert here.weights.keys() == there.weights.keys()
    for name, held in here.weights.items():
        assert type(there.weights[name]) is type(held)
        np.testing.assert_array_equal(loaded(there.weights[name]), loaded(held))
    assert {type(held) for held in there.weights.values()} == {np.ndarray, PlacedWeights}
    assert not any(held.flags.owndata for held in there.weights.values() if isinstance(held, np.ndarray))


def test_why_there_is_no_graph_comes_in_one_line(source: Any) -> None:
    with pytest.raises(LlmcError, match=r"^[^\n]*no-such-attention[^\n]*$"):
        exporter_apart(source)(Rung(24, "no-such-attention"))


def running() -> list[int]:
    """Processes of exports that this one has begun, and that load torch."""
    me = os.getpid()
    begun = [int(pid) for task in Path(f"/proc/{me}/task").iterdir() for pid in (task / "children").read_text().split()]
    return [
        pid for pid in begun if told(pid, "cmdline", "llmc.compiler.loaders.apart") and told(pid, "maps", "/torch/")
    ]


def told(process: int, file: str, text: str) -> bool:
    """Whether the system says this of a process, which may have ended just now."""
    try:
        return text in Path(f"/proc/{process}/{file}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def once_it_runs(act: Callable[[int], object]) -> None:
    """Do something with the other process, from a thread, once it has read its job and loads torch."""

    def wait() -> None:
        while not (found := running()):
            time.sleep(0.05)
        act(found[0])

    threading.Thread(target=wait, daemon=True).start()


def test_a_process_that_is_killed_is_told_so(source: Any) -> None:
    once_it_runs(lambda process: os.kill(process, signal.SIGKILL))
    with pytest.raises(LlmcError, match=r"the export was killed \(SIGKILL\), most often because memory ran out"):
        exporter_apart(source)(RUNG)


def test_a_process_that_fails_is_told_so(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(source.checkpoint.folder))
    (source.checkpoint.folder / "llmc.py").write_text("raise RuntimeError('no such compiler')", encoding="utf-8")
    with pytest.raises(LlmcError, match="the export failed: RuntimeError: no such compiler"):
        exporter_apart(source)(RUNG)


class _Interrupted:
    """A stream at which Ctrl-C comes while it is waited for."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def read(self) -> bytes:
        raise KeyboardInterrupt

    def close(self) -> None:
        self.stream.close()


def test_nothing_is_left_of_it_after_an_interrupt(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[int]()

    class Process(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self.stdout: Any = _Interrupted(self.stdout)
            begun.append(self.pid)
            assert Path(f"/proc/{self.pid}").exists()

    monkeypatch.setattr("subprocess.Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        exporter_apart(source)(RUNG)
    assert [pid for pid in begun if Path(f"/proc/{pid}").exists()] == []
    assert len(begun) == 1
