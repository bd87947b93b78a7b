"""The time that `convert-fp16` takes from file to file, without what measures and verifies it.

    python tests/bench/cast.py SOURCE TARGET

prints the seconds from the graph, loaded, until the converted model is on the disk: to be held against `cp` of SOURCE.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from llmc.passes.base import Context
from llmc.passes.graph import load_model, save_model
from llmc.passes.precision.convert_fp16 import ConvertFp16


def main(source: Path, target: Path) -> None:
    graph = load_model(source)
    begun = time.perf_counter()
    ConvertFp16().run(graph, Context())
    for path in save_model(graph, target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    print(time.perf_counter() - begun)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
