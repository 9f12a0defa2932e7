"""nvcc: find it, ask its version, and compile with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from cachebuilder.errors import ToolchainError

_HINT = "name one with --nvcc, set CUDA_HOME, or pip install 'cachebuilder[nvcc]' for PyPI's compiler wheels"

#: What a compilation adds to DeepGEMM's own flags: names inside the module then depend on no process id.
_REPEATABLE = "-frandom-seed=deep_gemm"


@dataclass(frozen=True)
class Toolchain:
    """One nvcc.

    Attributes:
        nvcc: the compiler driver.
        version_text: all that ``nvcc --version`` prints; DeepJIT's keys hold it whole.
        release: major.minor out of that text; legacy keys hold it.
        origin: how it was found, for the build's summary.
    """

    nvcc: Path
    version_text: str
    release: str
    origin: str

    def __str__(self) -> str:
        return f"nvcc {self.release} ({self.origin}, {self.nvcc})"

    def own_command(self, source: str, cubin: str, flags: Sequence[str], include: str) -> list[str]:
        """The command that DeepGEMM itself gives: one source to its cubin."""
        return [str(self.nvcc), source, "--cubin", "--output-file", cubin, *flags, f"-I{include}"]

    def ptx_command(self, source: str, ptx: str, flags: Sequence[str], include: str) -> list[str]:
        """The command that compiles one source to PTX with DeepGEMM's own flags."""
        return [str(self.nvcc), source, "--ptx", "--output-file", ptx, *flags, f"-I{include}", _REPEATABLE]

    def macros_command(self, source: str, macros: str, flags: Sequence[str], include: str) -> list[str]:
        """The command that lists the macros defined at the end of `ptx_command`'s source, as ``#define`` lines."""
        listing = ["-E", "--compiler-options=-dM", "--output-file", macros]
        return [str(self.nvcc), source, *listing, *flags, f"-I{include}", _REPEATABLE]

    def cubin_command(self, ptx: str, cubin: str, flags: Sequence[str]) -> list[str]:
        """The command that assembles PTX with the same flags; nvcc hands those that concern it to ptxas."""
        return [str(self.nvcc), ptx, "--cubin", "--output-file", cubin, *flags]


def find(nvcc: Path | None = None, release: str | None = None) -> Toolchain:
    """The compiler asked for, else the first that there is: ``CUDA_HOME``'s, PATH's, PyPI's wheels'.

    Args:
        nvcc: this one and no other.
        release: major.minor that it must be; candidates of another release are passed over.

    Raises:
        ToolchainError: none, one that does not run, or none of that release.
    """
    if nvcc is not None:
        found = _ask(nvcc.absolute(), "--nvcc")
        if release not in (None, found.release):
            raise ToolchainError(
                f"the manifest wants nvcc {release}, found {found.release} at {found.nvcc}", hint=_HINT
            )
        return found
    passed_over = []
    for path, origin in _candidates():
        found = _ask(path, origin)
        if release in (None, found.release):
            return found
        passed_over.append(f"{found.release} at {path} ({origin})")
    if passed_over:
        raise ToolchainError(f"the manifest wants nvcc {release}, found {', '.join(passed_over)}", hint=_HINT)
    raise ToolchainError("wanted nvcc, found none in CUDA_HOME, on PATH or among the installed wheels", hint=_HINT)


def _candidates() -> Iterator[tuple[Path, str]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (home := os.environ.get(variable)) and (path := Path(home, "bin", "nvcc")).exists():
            yield path.absolute(), variable
            break
    if on_path := shutil.which("nvcc"):
        yield Path(on_path).absolute(), "PATH"
    spec = util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(root).glob("*/bin/nvcc"), reverse=True):
            yield path, "PyPI wheels"


def _ask(path: Path, origin: str) -> Toolchain:
    try:
        # Both streams in one, as DeepGEMM reads it.
        done = subprocess.run(
            [path, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{path} ({origin}) does not run: {error}", hint=_HINT) from None
    text = done.stdout.decode(errors="replace")
    match = re.search(r"release (\d+\.\d+)", text)
    if done.returncode or not match:
        raise ToolchainError(f"{path} ({origin}): wanted nvcc's version text, found {text[:200]!r}", hint=_HINT)
    return Toolchain(path, text, match[1], origin)


#: The PTX of a kernel that does nothing. 8.7 is the first version of the language with all of our architectures
#: (PTX ISA 8.7, CUDA 12.8); later compilers read it.
_EMPTY_KERNEL = """.version 8.7
.target {arch}
.address_size 64
.visible .entry empty() {{ ret; }}
"""


def empty_kernel(toolchain: Toolchain, arch: str, scratch: Path) -> bytes:
    """A cubin with one kernel, which takes any arguments and does nothing.

    Args:
        arch: as nvcc names it, ``sm_90``.

    Raises:
        ToolchainError: this nvcc makes none for ``arch``.
    """
    (scratch / "empty.ptx").write_text(_EMPTY_KERNEL.format(arch=arch))
    command = [str(toolchain.nvcc), "empty.ptx", "--cubin", "-o", "empty.cubin", f"--gpu-architecture={arch}"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolchainError(f"{toolchain.nvcc} makes no kernel for {arch}: {done.stderr.strip()}", hint=_HINT)
    return (scratch / "empty.cubin").read_bytes()


def host_compiler_text() -> str:
    """What the C++ compiler that nvcc preprocesses with says of itself: ``$NVCC_CCBIN``, else gcc.

    Raises:
        ToolchainError: there is none.
    """
    name = os.environ.get("NVCC_CCBIN") or "gcc"
    try:
        return subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise ToolchainError(
            f"nvcc needs a host compiler, {name} does not run", hint="apt-get install g++, or set NVCC_CCBIN"
        ) from None
