"""Writes kernels into a manifest as `Source`: for what no op covers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import LiteralScalarString

from cachebuilder.common.files import write_atomically
from cachebuilder.errors import ManifestError
from cachebuilder.manifest import schema as manifests
from cachebuilder.restoring import misses


@dataclass(frozen=True)
class NewSource:
    """A kernel to write.

    Attributes:
        text: of ``kernel.cu``.
        comment: to stand above it.
        kernel: DeepGEMM's name for it, if known.
    """

    text: str
    comment: str
    kernel: str | None = None


@dataclass(frozen=True)
class Addition:
    """What became of a log's kernels: new to the manifest, known to it, or without a source that could be added."""

    new: int
    known: int
    without_source: int


def add(path: Path, sources: Sequence[NewSource]) -> int:
    """Write kernels into the manifest at ``path`` and keep its comments; returns how many were new to it.

    Raises:
        ManifestError: ``path`` is no manifest, or would be none afterwards; it is left as it was.
    """
    before, data = manifests.load(path)
    known = {source.source for source in before.sources}
    new = [source for source in sources if source.text not in known]
    if not new:
        return 0
    tree = _yaml().load(data.decode())
    written = _append(tree, new)
    after = manifests.parse(written, str(path))
    expected = [*(source.source for source in before.sources), *(source.text for source in new)]
    if [source.source for source in after.sources] != expected or after.ops != before.ops:
        raise _unwritable(path)
    write_atomically(path, written, ManifestError)
    return len(new)


def add_missed(path: Path, log: misses.Log) -> Addition:
    """Write the kernels of a log of misses into the manifest at ``path``, as `add` does, and raise as it does."""
    sources = []
    for miss in log.misses:
        if miss.source is not None:
            comment = f"{miss.kernel}: missed {miss.occurrences()}, not in {', '.join(miss.artifacts) or 'the cache'}"
            sources.append(NewSource(miss.source, comment))
    new = add(path, sources)
    return Addition(new, len(sources) - new, len(log.misses) - len(sources))


def create(path: Path, fields: Mapping[str, object], comment: str, sources: Sequence[NewSource]) -> None:
    """Write a manifest of nothing but ``sources`` to ``path``, replacing what is there.

    Args:
        fields: of the manifest: its name, its target and what else it needs.
        comment: for its head.

    Raises:
        ManifestError: this makes no manifest; nothing is written then.
    """
    tree = CommentedMap(fields)
    tree.yaml_set_start_comment(comment)
    written = _append(tree, sources)
    manifest = manifests.parse(written, str(path))
    if [source.source for source in manifest.sources] != [source.text for source in sources]:
        raise _unwritable(path)
    write_atomically(path, written, ManifestError)


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 1 << 16  # keeps long lines of the user's whole
    return yaml


def _append(tree: CommentedMap, sources: Sequence[NewSource]) -> bytes:
    listed = tree.setdefault("sources", CommentedSeq())
    for source in sources:
        kernel = {"kernel": source.kernel} if source.kernel else {}
        listed.append(CommentedMap(kernel | {"source": LiteralScalarString(source.text)}))
        listed.yaml_set_comment_before_after_key(len(listed) - 1, before=source.comment, indent=2)
    yaml = _yaml()
    yaml.indent(mapping=2, sequence=4, offset=2)
    written = io.BytesIO()
    yaml.dump(tree, written)
    return written.getvalue()


def _unwritable(path: Path) -> ManifestError:
    return ManifestError(
        f"{path}: wanted YAML that reads back as the kernel's source, found a change", hint="add the source by hand"
    )
