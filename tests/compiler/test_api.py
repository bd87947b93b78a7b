from __future__ import annotations

import subprocess
import sys


def test_the_public_names_are_functions_and_classes_whatever_was_imported_before() -> None:
    """A module of the same name must never stand in for a function: `import llmc.compiler.driver` loads them all."""
    code = (
        "import llmc.compiler.driver\n"
        "from llmc.compiler import BudgetError, LlmcError, Recipe, TargetError, compile, load, plan, verify\n"
        "assert all(callable(f) for f in (compile, load, plan, verify, Recipe, BudgetError, LlmcError, TargetError))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, llmc.compiler; assert not {'numpy', 'onnx', 'torch', 'pydantic'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
