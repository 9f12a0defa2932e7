"""Our C libraries: compiled once with the machine's C compiler, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cachebuilder.common.cache import cache_folder
from cachebuilder.errors import InstallationError

_FLAGS = ("-shared", "-fPIC", "-O2", "-std=gnu11", "-fvisibility=hidden")


def shared_library(
    name: str, what: str, sources: Sequence[Path | str], flags: Sequence[str] = (), depends: Sequence[bytes] = ()
) -> Path:
    """The path of a library for ``LD_PRELOAD``; compiled if it was not yet, from this text, by this compiler.

    Args:
        name: of the file.
        what: what an error calls it.
        sources: C files, or C text itself.
        flags: for the compiler, besides ours.
        depends: what else its bytes depend on, headers for one.

    Raises:
        InstallationError: no C compiler, or one that refuses.
    """
    compiler = find_c_compiler()
    texts = [source if isinstance(source, str) else source.read_text() for source in sources]
    digest = hashlib.sha256()
    for part in (*(text.encode() for text in texts), *depends, repr((compiler, _FLAGS, flags)).encode()):
        digest.update(hashlib.sha256(part).digest())
    folder = cache_folder() / what.lower().replace(" ", "-") / digest.hexdigest()[:32]
    library = folder / name
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        files = [Path(scratch, f"{index}.c") for index in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        built = Path(scratch, name)
        command = [*compiler, *_FLAGS, *flags, "-o", str(built), *map(str, files), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InstallationError(f"the {what} did not compile: {shlex.join(command)}\n{done.stderr.strip()}")
        os.replace(built, library)  # another build may have put the same there meanwhile: equal by construction
    return library


def find_c_compiler() -> list[str]:
    """``$CC``, else the first of cc, gcc, clang.

    Raises:
        InstallationError: there is none.
    """
    if given := os.environ.get("CC"):
        return shlex.split(given)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise InstallationError("wanted a C compiler, found none", hint="apt-get install gcc")
