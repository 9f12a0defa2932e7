"""Our C libraries, compiled once with the machine's C compiler and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from cachebuilder.common.cache import open_own
from cachebuilder.errors import InstallationError

_FLAGS = ("-shared", "-fPIC", "-O2", "-std=gnu11", "-fvisibility=hidden", "-Werror=implicit-function-declaration")


def shared_library(
    name: str,
    what: str,
    sources: Sequence[Path | str | Callable[[], str]],
    flags: Sequence[str] = (),
    depends: Sequence[bytes] = (),
) -> Path:
    """The path of a library for ``LD_PRELOAD``, compiled now if this compiler has not compiled this code before.

    Args:
        name: the file's name.
        what: what errors call the library.
        sources: C files, or C code as text. A function makes its text only for a compilation, so ``depends`` must have
            all that its text depends on.
        flags: for the compiler, in addition to ours.
        depends: further contents that the library depends on, such as headers.

    Raises:
        InstallationError: no C compiler was found, or it refuses the code; or another user can write to the cache
            folder.
    """
    compiler = find_c_compiler()
    digest = hashlib.sha256()
    known = [_text(source) for source in sources if not callable(source)]
    for part in (*(text.encode() for text in known), *depends, repr((compiler, _FLAGS, flags)).encode()):
        digest.update(hashlib.sha256(part).digest())
    with open_own(what.lower().replace(" ", "-"), digest.hexdigest()[:32]) as opened:
        folder, library = opened.path, opened.path / name
        if opened.holds_safe(name):
            return library
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        files = [Path(scratch, f"{index}.c") for index in range(len(sources))]
        for file, source in zip(files, sources, strict=True):
            file.write_text(_text(source))
        built = Path(scratch, name)
        command = [*compiler, *_FLAGS, *flags, "-o", str(built), *map(str, files), "-ldl"]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            raise InstallationError(f"the {what} did not compile: {shlex.join(command)}\n{process.stderr.strip()}")
        built.chmod(0o755)  # whatever the umask
        os.replace(built, library)  # another process may have put an equal one there
    return library


def _text(source: Path | str | Callable[[], str]) -> str:
    if isinstance(source, Path):
        return source.read_text()
    return source if isinstance(source, str) else source()


def find_c_compiler() -> list[str]:
    """The command of a C compiler: ``$CC``, else the first of cc, gcc and clang on PATH.

    Raises:
        InstallationError: none was found.
    """
    if command := os.environ.get("CC"):
        return shlex.split(command)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise InstallationError("wanted a C compiler, found none", hint="apt-get install gcc, or set CC")
