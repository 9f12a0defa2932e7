"""Writes kernels into a manifest as `Source`: for what no op covers."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import LiteralScalarString

from cachebuilder.common.files import write_atomically
from cachebuilder.errors import ManifestError
from cachebuilder.manifest import schema as manifests
from cachebuilder.manifest.schema import Manifest
from cachebuilder.restoring.misses import Log


@dataclass(frozen=True)
class NewSource:
    """A kernel to write: the text of ``kernel.cu``, the comment above it, and DeepGEMM's name for it if known."""

    text: str
    comment: str
    kernel: str | None = None


@dataclass(frozen=True)
class Addition:
    """What became of a log's kernels.

    Attributes:
        new: written into the manifest.
        known: in the manifest already.
        refused: why some were not written, a sentence for each reason.
        without_source: nothing could be written.
    """

    new: int
    known: int
    refused: tuple[str, ...]
    without_source: int


def add(path: Path, sources: Sequence[NewSource]) -> int:
    """Write kernels into the manifest at ``path`` and keep its comments; returns how many were new to it.

    Raises `ManifestError` where it is no manifest, or would be none afterwards; it is left as it was.
    """
    before, data = manifests.load(path)
    known = {source.source for source in before.sources}
    new = [source for source in sources if source.text not in known]
    if new:
        _write(path, _yaml().load(data.decode()), new, before)
    return len(new)


def add_missed(path: Path, log: Log) -> Addition:
    """Write the kernels of a log of misses into the manifest at ``path``, as `add` does, and raise as it does."""
    can_be_added = [miss for miss in log.misses if miss.can_be_added]
    sources = []
    for miss in can_be_added:
        if miss.source is not None:
            comment = f"{miss.kernel}: missed {miss.occurrences()}, not in {', '.join(miss.artifacts) or 'the cache'}"
            sources.append(NewSource(miss.source, comment))
    new = add(path, sources)
    return Addition(new, len(sources) - new, tuple(_refusals(log)), len(can_be_added) - len(sources))


def _refusals(log: Log) -> Iterator[str]:
    """A sentence for each reason why no build would help some of a log's kernels, and the reason's remedies."""
    counts = Counter(
        (miss.entry is None, tuple((one.field, one.remedy) for one in miss.differences))
        for miss in log.misses
        if not miss.can_be_added
    )
    for (foreign, differences), count in counts.items():
        kernels = "1 kernel is" if count == 1 else f"{count} kernels are"
        if foreign:
            yield f"{kernels} not added: not DeepGEMM's"
        elif differences:
            remedies = "; ".join(f"{field} differs: {remedy}" for field, remedy in differences)
            yield f"{kernels} not added: the cache has the source under another key. {remedies}"
        else:
            yield f"{kernels} not added: the cache has the source"


def create(path: Path, fields: Mapping[str, object], comment: str, sources: Sequence[NewSource]) -> None:
    """Write a manifest of ``fields`` and ``sources``, headed by ``comment``, to ``path``, replacing what is there.

    Raises `ManifestError` where this makes no manifest; nothing is written then.
    """
    tree = CommentedMap(fields)
    tree.yaml_set_start_comment(comment)
    _write(path, tree, sources)


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 1 << 16  # keeps long lines of the user's whole
    return yaml


def _write(path: Path, tree: CommentedMap, new: Sequence[NewSource], before: Manifest | None = None) -> None:
    """Write ``tree`` with these sources to ``path``, if it reads back as them and all that was in it before."""
    listed = tree.setdefault("sources", CommentedSeq())
    for source in new:
        kernel = {"kernel": source.kernel} if source.kernel else {}
        listed.append(CommentedMap(kernel | {"source": LiteralScalarString(source.text)}))
        listed.yaml_set_comment_before_after_key(len(listed) - 1, before=source.comment, indent=2)
    yaml = _yaml()
    yaml.indent(mapping=2, sequence=4, offset=2)
    written = io.BytesIO()
    yaml.dump(tree, written)
    after = manifests.parse(written.getvalue(), str(path))
    known = before.sources if before else ()
    expected = [*(source.source for source in known), *(source.text for source in new)]
    kept = before is None or after.model_copy(update={"sources": known}) == before
    if [source.source for source in after.sources] != expected or not kept:
        raise ManifestError(
            f"{path}: wanted YAML that reads back as the kernel's source, found a change", hint="add the source by hand"
        )
    write_atomically(path, written.getvalue(), ManifestError)
