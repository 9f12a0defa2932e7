"""What a cubin says about its kernel."""

import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from cachebuilder.artifact.read import open_archive
from cachebuilder.building import Built
from cachebuilder.cuda import cubin
from cachebuilder.errors import InstallationError


def _cuobjdump(nvcc: Path) -> str:
    beside = [nvcc.resolve().with_name("cuobjdump")]
    if triton := util.find_spec("triton"):  # comes with torch, and brings its own
        beside += Path(triton.origin or "").parent.glob("backends/nvidia/bin/cuobjdump")
    found = shutil.which("cuobjdump") or next((str(path) for path in beside if path.is_file()), None)
    return found or pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")


def _cubins(artifact: Path) -> list[bytes]:
    with open_archive(artifact) as archive:
        return [data for member, data in archive.files() if member.file.name == "kernel.cubin"]


def test_registers_and_memory_are_what_cuobjdump_says(built: Built, tmp_path: Path) -> None:
    tool = _cuobjdump(built.inputs.toolchain.nvcc)
    for data in _cubins(built.packed.path):
        (file := tmp_path / "kernel.cubin").write_bytes(data)
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        said = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", text))
        found = cubin.resources(data)
        assert f"Function {found.function}:" in text
        assert [found.registers, found.stack_bytes, found.shared_bytes] == [
            int(said[name]) for name in ("REG", "STACK", "SHARED")
        ]
        assert (found.threads or 32) % 32 == 0 and found.code_bytes % 128 == 0


@pytest.mark.parametrize("cut", [0, 3, 64, 500])
def test_bytes_that_are_no_cubin_are_a_named_error(built: Built, cut: int) -> None:
    with pytest.raises(cubin.CubinError, match="wanted a cubin"):
        cubin.resources(_cubins(built.packed.path)[0][:cut])


def test_without_pyelftools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(InstallationError, match="needs pyelftools"):
        cubin.resources(b"")
