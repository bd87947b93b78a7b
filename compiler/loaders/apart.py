"""Exports a large model in a process of its own: what torch's exporter never gives back ends with it.

After an export more objects stay alive than a graph has, 6 MB for each layer of a decoder: torch holds them in ways
that no collector sees. The job, pickled, comes in on standard input; the graph's structure, or why there is none, goes
out on standard output, the weights that stand in no file of the model through a file without a name, to be mapped.
"""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Protocol

import onnx

from llmc.compiler.child import end_with_parent, how_it_ended
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.torch_export import Exported, Rung, explain, exporter_of
from llmc.compiler.spill import spill_folder
from llmc.passes.graph import ALIGNMENT, Array, Structure, Weights, from_structure, to_structure

if TYPE_CHECKING:
    from llmc.compiler.loaders.signature import Signature
    from llmc.compiler.loaders.widened import Widened

APART_FROM = 512 << 20
"""Bytes of weights from which the seconds that a process takes to begin are worth it."""


class Source(Protocol):
    """A torch model that can be loaded, here or in another process: it can be pickled."""

    @property
    def loaded(self) -> tuple[Any, Widened, frozenset[str]]:
        """The model, its weights, and the names of what its files do not have."""

    @property
    def signature(self) -> Signature:
        """Its inputs and outputs."""


_Answer = tuple[bytes, dict[str, Array | Weights], str, frozenset[str]]
"""A structure's model and weights, and what else an `Exported` has: of types that both processes call the same."""


def exporter_apart(source: Source) -> Callable[[Rung], Exported]:
    """Exports `source` in another process, which loads it for itself. Raises LlmcError with the reason it cannot."""

    def export(rung: Rung) -> Exported:
        with tempfile.TemporaryFile(dir=spill_folder()) as arrays, tempfile.TemporaryFile() as log:
            answer = _ask((source, rung), arrays, log)
        if isinstance(answer, str):
            raise LlmcError(answer)
        model, weights, attention, parameters = answer
        structure = Structure(onnx.ModelProto.FromString(model), weights)
        return Exported(from_structure(structure), attention, parameters)

    return export


def _ask(job: tuple[Source, Rung], arrays: IO[bytes], log: IO[bytes]) -> _Answer | str:
    """What the other process answers; it dies with this call, on Ctrl-C too. Raises LlmcError where it died itself."""
    command = [sys.executable, "-P", "-m", "llmc.compiler.loaders.apart", str(arrays.fileno())]
    with subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        pass_fds=[arrays.fileno()],
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended, and says so
                process.stdin.write(pickle.dumps(job))
            told = process.stdout.read()
            process.wait()
        except BaseException:
            process.kill()
            raise
    if not told:
        log.seek(0)
        last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        how = how_it_ended(-process.returncode) if process.returncode < 0 else f"failed: {last}"
        raise LlmcError(f"the process of the export {how}")
    body, spans = pickle.loads(told)
    mapped = memoryview(mmap.mmap(arrays.fileno(), 0, access=mmap.ACCESS_READ)) if spans else memoryview(b"")
    return pickle.loads(body, buffers=[mapped[begin:end] for begin, end in spans])  # type: ignore[no-any-return]


def main() -> None:
    """Do the one job that standard input names."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    source, rung = pickle.load(sys.stdin.buffer)
    end_with_parent()
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(_answer(source, rung), protocol=5, buffer_callback=buffers.append)
    spans, end = [], 0
    with os.fdopen(int(sys.argv[1]), "wb") as file:
        for buffer in buffers:
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            file.seek(begin)
            end = begin + file.write(buffer.raw())
            spans.append((begin, end))
    with answers:
        pickle.dump((body, spans), answers)


def _answer(source: Source, rung: Rung) -> _Answer | str:
    try:
        model, weights, _ = source.loaded
        made = weights.settled(lambda: exporter_of(model, source.signature, weights)(rung))
    except Exception as error:  # whatever goes wrong inside the exporter, the next rung may do
        return explain(error)
    structure = to_structure(made.graph)
    model_bytes = structure.model.SerializeToString(deterministic=True)
    return model_bytes, dict(structure.weights), made.attention, made.parameters


if __name__ == "__main__":
    main()
