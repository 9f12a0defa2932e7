"""The keys of kept plans and cubins: the code that decides a plan or a cubin is part of its key."""

from __future__ import annotations

import shutil
from pathlib import Path

import grimp
import pytest

import cachebuilder
from cachebuilder.common.code import code_digest
from cachebuilder.compiling import compiler
from cachebuilder.planning import kept as planning

PACKAGE = Path(cachebuilder.__file__).parent
KEYS = {"plan": planning.CODE, "cubin": compiler.CODE}


def folders_that_it_imports(module: str) -> set[str]:
    """The package's folders with a module that ``module`` imports, directly or not."""
    graph = grimp.build_graph("cachebuilder", cache_dir=None)
    imported = {module, *graph.find_upstream_modules(module)} - {"cachebuilder"}
    return {name.split(".")[1] for name in imported if (PACKAGE / name.split(".")[1]).is_dir()}


@pytest.mark.parametrize("module", ["planning.make", "sweep.child"])
def test_a_plans_key_holds_every_folder_whose_code_makes_the_plan(module: str) -> None:
    assert folders_that_it_imports(f"cachebuilder.{module}") <= set(planning.CODE)


def test_a_cubins_key_holds_every_folder_whose_code_decides_its_bytes() -> None:
    # The compiler imports these for the list of kernels. A kernel's source and flags are part of its key themselves.
    decide_only_the_kernels = {"planning", "sweep", "virtual_gpu", "manifest", "ops", "deepgemm", "flashinfer"}
    assert folders_that_it_imports("cachebuilder.compiling.compiler") - decide_only_the_kernels <= set(compiler.CODE)


@pytest.mark.parametrize("key", KEYS)
def test_an_edit_in_a_folder_changes_the_keys_that_hold_it_and_no_other(key: str, tmp_path: Path) -> None:
    package = tmp_path / "cachebuilder"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_digest(KEYS[key], package)
    for folder in sorted(path for path in package.iterdir() if path.is_dir()):
        file = next(path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".c") and path.stat().st_size)
        text = file.read_bytes()
        file.write_bytes(text + b"\n")
        assert (code_digest(KEYS[key], package) != before) is (folder.name in KEYS[key]), folder.name
        file.write_bytes(text)
    assert code_digest(KEYS[key], package) == before
