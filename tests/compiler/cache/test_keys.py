from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llmc.compiler.cache.keys import code_digest, key_of

PACKAGE = {
    "__init__": "",
    "base": "from llmc.here import helper\n",
    "helper": "SIZE = 1\n",
    "one": "from llmc.here.base import helper\n\ndef f():\n    import llmc.here.late\n",
    "late": "from llmc.here.sub import deep\n",
    "sub/__init__": "",
    "sub/deep": "X = 1\n",
    "other/__init__": "",
    "other/apart": "Y = 1\n",
}


def test_a_key_depends_on_every_part_and_on_nothing_else() -> None:
    assert key_of("a", {"x": 1, "y": (2, 3)}) == key_of("a", {"y": [2, 3], "x": 1})
    assert len({key_of(*parts) for parts in (["a"], ["b"], ["a", None], ["a", ""], [["a"]], [1], [1.5], ["1"])}) == 8


def digests(folder: Path) -> dict[str, str]:
    """Of every module of a package `llmc.here`, each as a new process sees it."""
    program = (
        "import sys, llmc; from llmc.compiler.cache.keys import code_digest\n"
        f"llmc.__path__ = [*llmc.__path__, {str(folder)!r}]\n"
        f"for name in {sorted(PACKAGE)!r}:\n"
        "    print(name, code_digest(('llmc.here.' + name.replace('/', '.')).removesuffix('.__init__')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())  # type: ignore[arg-type]


def test_code_counts_with_all_that_it_imports(tmp_path: Path) -> None:
    for name, text in PACKAGE.items():
        path = tmp_path / f"here/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    before = digests(tmp_path)
    assert before == digests(tmp_path)
    for changed, affected in {
        "sub/deep": {"sub/deep", "sub/__init__", "late", "one", "base", "helper", "__init__"},
        "other/apart": {"other/apart", "other/__init__"},
    }.items():
        path = tmp_path / f"here/{changed}.py"
        path.write_text(path.read_text(encoding="utf-8") + "# a change\n", encoding="utf-8")
        after = digests(tmp_path)
        different = {name for name in PACKAGE if before[name] != after[name]}
        assert different >= affected - {"helper"}, changed
        assert different.isdisjoint({"other/apart", "sub/deep", "helper"} - affected), changed
        before = after


def test_passes_have_keys_of_their_own() -> None:
    gelu, dead = code_digest("llmc.passes.fuse.fuse_gelu"), code_digest("llmc.passes.simplify.eliminate_dead")
    assert gelu != dead
    assert gelu == code_digest("llmc.passes.fuse.fuse_gelu")
