"""What targets made: engines and the like, with all that is known of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from llmc.compiler.cache.keys import code_digest, environment
from llmc.compiler.cache.memory import Memory, State
from llmc.compiler.cache.store import copy
from llmc.compiler.targets import BuildRequest, Built, Target, gpu


def recall(
    memory: Memory, graph: State, target: Target, request: BuildRequest, folder: Path, make: Callable[[], Built]
) -> tuple[Built, bool]:
    """What `make` builds of `graph` into `folder`, or built before; and whether that was before."""
    if not graph.digest:
        return make(), False
    gpus = asdict(driver) if target.kind == "tensorrt" and (driver := gpu.driver()) else None
    code = code_digest(type(target).__module__)
    parts = (graph.digest, target.kind, dict(target.versions), asdict(request), gpus, code, environment())
    found = memory.find("build", *parts)
    if found is not None and memory.store is not None:
        files = found.value["files"]
        for name, digest in files.items():
            copy(memory.store.blob(digest), folder / name)
        about = found.value["about"]
        return Built([folder / name for name in files], about["facts"], about["layers"], about["warnings"]), True
    built = make()
    digests = memory.add_files(built.files)
    if digests is not None:
        about = {"facts": built.facts, "layers": built.layers, "warnings": built.warnings}
        memory.keep("build", parts, {"files": digests, "about": about}, list(digests.values()))
    return built, False
