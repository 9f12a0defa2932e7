"""A stand-in for `cachebuilder.restore` in tests of what comes after it: the same layout, with a minimal nvcc."""

from __future__ import annotations

from pathlib import Path

from cachebuilder.artifact.index import Index
from cachebuilder.frozen import LOG_VARIABLE, frozen_nvcc
from tests.test_build import members

_NVCC = f"""\
#!/bin/sh
[ "$1" = --version ] && exec cat "${{0%/*}}/version.txt"
echo "{{}}" >>"${LOG_VARIABLE}"
exit 1
"""


def unpack(artifact: Path, to: Path) -> Path:
    """``artifact`` as it lies in ``to`` after a restore at the place it was built for."""
    for name, data in members(artifact).items():
        if name.startswith("cache/"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(data)
        else:
            suffix = {"artifact.json": ".json", "manifest.yaml": ".yaml"}[name]
            file = to / "cachebuilder" / "artifacts" / f"{artifact.name.removesuffix('.tar.zst')}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            if suffix == ".json":
                nvcc = frozen_nvcc(to)
                nvcc.parent.mkdir(parents=True, exist_ok=True)
                nvcc.write_text(_NVCC)
                nvcc.chmod(0o755)
                text = Index.model_validate_json(data).fingerprint.compiler
                (nvcc.parent / "version.txt").write_text(text)
    return to
