"""Which headers the kernels of some ops include, kept from earlier builds.

A front end needs 2 s or more to parse them, and a plan's first kernel comes only when torch is imported. So a build
starts the front ends that an earlier build of the same ops needed. If it needs others, that cost the CPU time of one
front end; no cubin depends on it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from pydantic import ValidationError

from cachebuilder.common.cache import open_own, own_folder
from cachebuilder.common.kept import touch
from cachebuilder.common.records import Record
from cachebuilder.compiling.units import split_source
from cachebuilder.errors import InstallationError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel

_FOLDER = "headers"
_MAX_BYTES = 1 << 20


class Head(Record):
    """What sources of one family begin with, and their flags for nvcc."""

    text: str
    flags: tuple[str, ...]


class Heads(Record):
    """Those of a manifest's kernels; the one of most kernels is first."""

    heads: tuple[Head, ...]


def read(inputs: Inputs) -> tuple[Head, ...]:
    """What the last build of these ops compiled; empty if there was none."""
    with open_own(_FOLDER) as folder:
        name = _file(inputs)
        data = folder.read_safe(name, _MAX_BYTES)
        if data is None:
            return ()
        touch(folder.path / name)
    try:
        return Heads.model_validate_json(data).heads
    except ValidationError:
        return ()


def keep(inputs: Inputs, kernels: Sequence[Kernel]) -> None:
    """Keep the heads of ``kernels`` for later builds. Raises `InstallationError` if they cannot be written."""
    counts = Counter((split_source(kernel.source)[0], kernel.flags) for kernel in kernels)
    heads = tuple(Head(text=text, flags=flags) for (text, flags), _ in counts.most_common())
    Heads(heads=heads).write(own_folder(_FOLDER) / _file(inputs), InstallationError)


def _file(inputs: Inputs) -> str:
    """The name of the file for builds with the same headers, compiler, architecture, variables and names of ops."""
    manifest = inputs.manifest
    facts = [
        inputs.installation.include_digest,
        inputs.toolchain.version_text,
        f"{manifest.target.gpu.major}.{manifest.target.gpu.minor}",
        manifest.environment,
        sorted({op.op for op in manifest.ops}),
    ]
    return f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}.json"
