"""The public API: what ``import cachebuilder`` gives."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import cachebuilder
from cachebuilder.errors import CacheBuilderError

IMPORTED = "import sys, cachebuilder; print(*sorted(name.partition('.')[0] for name in sys.modules))"


def test_importing_the_package_imports_nothing_slow() -> None:
    loaded = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True).stdout.split()
    assert "cachebuilder" in loaded
    assert not {"torch", "pydantic", "click", "cryptography", "ruamel", "zstandard"} & set(loaded)


@pytest.mark.parametrize("name", cachebuilder.__all__)
def test_every_public_name_exists_and_has_a_docstring(name: str) -> None:
    value = getattr(cachebuilder, name)
    assert name in dir(cachebuilder)
    assert isinstance(value, str) or inspect.getdoc(value)


def test_a_name_that_is_not_public_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cachebuilder.nothing  # noqa: B018


@pytest.mark.parametrize("name", [name for name in cachebuilder.__all__ if name.islower() and name[0] != "_"])
def test_functions_take_at_most_two_positional_arguments_and_say_what_they_raise(name: str) -> None:
    function = getattr(cachebuilder, name)
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    positional = [kind for kind in kinds if kind is not inspect.Parameter.KEYWORD_ONLY]
    assert 1 <= len(positional) <= 2
    assert "Raises:" in (inspect.getdoc(function) or "")


def test_every_kind_of_failure_is_public() -> None:
    kinds = {name for name in cachebuilder.__all__ if name.endswith("Error")}
    assert all(issubclass(getattr(cachebuilder, name), CacheBuilderError) for name in kinds)


def test_a_manifest_is_loaded_planned_and_built_as_the_command_line_does(
    built: cachebuilder.Built, small: Path, tmp_path: Path
) -> None:
    steps: set[str] = set()

    def watch(step: str, done: int, total: int, share: float | None = None) -> None:
        steps.add(step)

    progress: cachebuilder.Progress = watch
    inputs = cachebuilder.load_manifest(str(small), deep_gemm=built.inputs.installation.imported_as)
    plan = cachebuilder.plan(inputs, progress=progress)
    assert plan.kernels == built.plan.kernels
    again = cachebuilder.build(inputs, str(tmp_path / "again.tar.zst"), progress=progress)
    assert again.packed.sha256 == built.packed.sha256 and "compile" in steps


def test_the_annotations_of_the_api_are_its_public_types() -> None:
    hints = typing.get_type_hints(cachebuilder.plan)
    assert hints["inputs"] is cachebuilder.Inputs and hints["return"] is cachebuilder.Plan
