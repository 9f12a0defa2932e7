"""nvcc: find it, ask for its version, and build the command lines that compile with it."""

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

#: The one flag that we add to DeepGEMM's own. Without it, names inside the module depend on nvcc's process id.
_REPEATABLE = "-frandom-seed=deep_gemm"


@dataclass(frozen=True)
class Toolchain:
    """One nvcc.

    Attributes:
        nvcc: the compiler driver's path.
        version_text: the whole output of ``nvcc --version``, which is part of DeepJIT's keys.
        release: major.minor from that text, which is part of legacy keys.
        origin: how it was found, for the build's summary.
    """

    nvcc: Path
    version_text: str
    release: str
    origin: str

    def __str__(self) -> str:
        return f"nvcc {self.release} ({self.origin}, {self.nvcc})"

    def is_older_than(self, release: str | None) -> bool:
        """Whether it is older than ``release``, as major.minor; 12.10 is later than 12.9. False where that is None."""
        own, other = ([int(part) for part in text.split(".")] for text in (self.release, release or "0"))
        return own < other

    def include_folders(self, scratch: Path) -> list[Path]:
        """The folders of nvcc's own headers, as nvcc names them; ``scratch`` is for an empty source.

        Raises:
            ToolchainError: nvcc names none.
        """
        (scratch / "empty.cu").touch()
        command = [str(self.nvcc), "--dryrun", "-E", "empty.cu"]
        dry_run = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False).stderr
        line = re.search(r'^#\$ INCLUDES="(.*?)"', dry_run, re.MULTILINE)
        folders = [Path(word.removeprefix("-I")) for word in (line[1] if line else "").split() if word.startswith("-I")]
        if not folders:
            raise ToolchainError(
                f"{self.nvcc} --dryrun: wanted its include folders, found {dry_run[:200]!r}", hint=_HINT
            )
        return folders

    def own_command(self, source: str, cubin: str, flags: Sequence[str], include: str) -> list[str]:
        """The command that DeepGEMM itself runs: one source to its cubin."""
        return [str(self.nvcc), source, "--cubin", "--output-file", cubin, *flags, f"-I{include}"]

    def ptx_command(self, source: str, ptx: str, flags: Sequence[str], include: str) -> list[str]:
        """The command that compiles one source to PTX with DeepGEMM's own flags."""
        return [str(self.nvcc), source, "--ptx", "--output-file", ptx, *flags, f"-I{include}", _REPEATABLE]

    def macros_command(self, source: str, macros: str, flags: Sequence[str], include: str) -> list[str]:
        """The command that lists the macros defined at the end of `ptx_command`'s source, as ``#define`` lines."""
        listing = ["-E", "--compiler-options=-dM", "--output-file", macros]
        return [str(self.nvcc), source, *listing, *flags, f"-I{include}", _REPEATABLE]

    def cubin_command(self, ptx: str, cubin: str, flags: Sequence[str]) -> list[str]:
        """The command that assembles PTX with the same flags; nvcc passes on to ptxas the flags that concern it."""
        return [str(self.nvcc), ptx, "--cubin", "--output-file", cubin, *flags]


def find(nvcc: Path | None = None, release: str | None = None, at_least: str | None = None) -> Toolchain:
    """Find nvcc: ``nvcc`` if it is given, else the first of ``CUDA_HOME``, PATH and PyPI's wheels that will do.

    Args:
        nvcc: use this compiler and no other.
        release: the release that the manifest wants, as major.minor; compilers of other releases are skipped.
        at_least: the oldest release that DeepGEMM takes; older compilers are skipped.

    Raises:
        ToolchainError: there is no nvcc, one does not run, or none has that release.
    """
    others = []
    for path, origin in _candidates() if nvcc is None else [(nvcc.absolute(), "--nvcc")]:
        toolchain = _at(path, origin)
        if release in (None, toolchain.release) and not toolchain.is_older_than(at_least):
            return toolchain
        others.append(f"{toolchain.release} at {path} ({origin})")
    wishes = [f"the manifest wants nvcc {release}"] if release else []
    wishes += [f"this DeepGEMM wants nvcc {at_least} or later"] if at_least else []
    if others:
        raise ToolchainError(f"{' and '.join(wishes)}, found {', '.join(others)}", hint=_HINT)
    raise ToolchainError("wanted nvcc, found none in CUDA_HOME, on PATH or among the installed wheels", hint=_HINT)


def _candidates() -> Iterator[tuple[Path, str]]:
    """The path of each nvcc on this machine and how it was found, in the order of preference."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        path = Path(os.environ.get(variable, ""), "bin", "nvcc")
        if os.environ.get(variable) and path.exists():
            yield path.absolute(), variable
            break
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path).absolute(), "PATH"
    wheels = util.find_spec("nvidia")
    roots = wheels.submodule_search_locations if wheels else None
    for root in roots or ():
        for path in sorted(Path(root).glob("*/bin/nvcc"), reverse=True):
            yield path, "PyPI wheels"


def _at(path: Path, origin: str) -> Toolchain:
    """The toolchain of the nvcc at ``path``. Raises `ToolchainError` if it does not run or is not nvcc."""
    try:
        # Both streams together, as DeepGEMM reads them.
        version = subprocess.run(
            [path, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{path} ({origin}) does not run: {error}", hint=_HINT) from None
    text = version.stdout.decode(errors="replace")
    if version.returncode:
        raise _not_nvcc(path, text, origin)
    return of_text(path, text, origin)


def of_text(path: Path, text: str, origin: str) -> Toolchain:
    """The toolchain of an nvcc with this version text. Raises `ToolchainError` if it is none of nvcc's."""
    release = re.search(r"release (\d+\.\d+)", text)
    if not release:
        raise _not_nvcc(path, text, origin)
    return Toolchain(path, text, release[1], origin)


def _not_nvcc(path: Path, text: str, origin: str) -> ToolchainError:
    return ToolchainError(f"{path} ({origin}): wanted nvcc's version text, found {text[:200]!r}", hint=_HINT)


#: The PTX of a kernel that does nothing. PTX ISA 8.7 (CUDA 12.8) is the first version of the language that has all of
#: our architectures; later compilers read it as well.
_EMPTY_KERNEL = """.version 8.7
.target {arch}
.address_size 64
.visible .entry empty() {{ ret; }}
"""


def empty_kernel(toolchain: Toolchain, arch: str, scratch: Path) -> bytes:
    """Make a cubin with one kernel, which takes any arguments and does nothing.

    Args:
        arch: as nvcc names it, for example ``sm_90``.

    Raises:
        ToolchainError: this nvcc cannot compile for ``arch``.
    """
    (scratch / "empty.ptx").write_text(_EMPTY_KERNEL.format(arch=arch))
    command = [str(toolchain.nvcc), "empty.ptx", "--cubin", "-o", "empty.cubin", f"--gpu-architecture={arch}"]
    compilation = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    if compilation.returncode:
        raise ToolchainError(f"{toolchain.nvcc} cannot compile for {arch}: {compilation.stderr.strip()}", hint=_HINT)
    return (scratch / "empty.cubin").read_bytes()


def host_compiler_text() -> str:
    """The version text of the C++ compiler that nvcc preprocesses with: ``$NVCC_CCBIN``, else gcc.

    Raises:
        ToolchainError: it does not run.
    """
    name = os.environ.get("NVCC_CCBIN") or "gcc"
    try:
        return subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise ToolchainError(
            f"wanted a host compiler for nvcc: {name} does not run", hint="apt-get install g++, or set NVCC_CCBIN"
        ) from None
