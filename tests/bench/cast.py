"""The time that a pass such as `convert-fp16` takes from file to file, without what measures and verifies it.

    python tests/bench/cast.py PASS SOURCE TARGET

prints the seconds from the graph, loaded, until the converted model is on the disk: to be held against `cp` of SOURCE.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from llmc.passes.base import Context, find
from llmc.passes.graph import load_model, save_model


def main(key: str, source: Path, target: Path) -> None:
    kind = find(key)
    assert kind is not None, key
    graph = load_model(source)
    begun = time.perf_counter()
    kind().run(graph, Context())
    for path in save_model(graph, target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    print(time.perf_counter() - begun)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
