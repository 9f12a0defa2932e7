"""Kernels written into a manifest as `Source`: for what no op covers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import LiteralScalarString

from cachebuilder.common.files import write_atomically
from cachebuilder.errors import ManifestError
from cachebuilder.manifest import schema as manifests


class NewSource(NamedTuple):
    """A kernel to write: the text of ``kernel.cu``, a comment to stand above it, DeepGEMM's name for it if known."""

    text: str
    comment: str
    kernel: str | None = None


def add(path: Path, sources: Sequence[NewSource]) -> int:
    """Write kernels into the manifest at ``path``, its comments kept; returns how many were new to it.

    Raises:
        ManifestError: ``path`` is no manifest, before or after; it is left as it was then.
    """
    before, data = manifests.load(path)
    known = {source.source for source in before.sources}
    new = [source for source in sources if source.text not in known]
    if not new:
        return 0
    tree = _yaml().load(data.decode())
    written = _append(tree, new)
    after = manifests.parse(written, str(path))
    wanted = [*(source.source for source in before.sources), *(source.text for source in new)]
    if [source.source for source in after.sources] != wanted or after.ops != before.ops:
        raise _unwritable(path)
    write_atomically(path, written, ManifestError)
    return len(new)


def create(path: Path, fields: Mapping[str, object], comment: str, sources: Sequence[NewSource]) -> None:
    """Write a manifest of ``sources`` and nothing else to ``path``, replacing what is there.

    Args:
        fields: of the manifest: its name, its target and what else it needs.
        comment: for its head.

    Raises:
        ManifestError: this makes no manifest; nothing is written then.
    """
    tree = CommentedMap(fields)
    tree.yaml_set_start_comment(comment)
    written = _append(tree, sources)
    made = manifests.parse(written, str(path))
    if [source.source for source in made.sources] != [source.text for source in sources]:
        raise _unwritable(path)
    write_atomically(path, written, ManifestError)


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 1 << 16  # no line of the writer's is folded
    return yaml


def _append(tree: CommentedMap, sources: Sequence[NewSource]) -> bytes:
    listed = tree.setdefault("sources", CommentedSeq())
    for source in sources:
        named = {"kernel": source.kernel} if source.kernel else {}
        listed.append(CommentedMap(named | {"source": LiteralScalarString(source.text)}))
        listed.yaml_set_comment_before_after_key(len(listed) - 1, before=source.comment, indent=2)
    yaml = _yaml()
    yaml.indent(mapping=2, sequence=4, offset=2)
    written = io.BytesIO()
    yaml.dump(tree, written)
    return written.getvalue()


def _unwritable(path: Path) -> ManifestError:
    return ManifestError(f"{path}: a source cannot be written as YAML without a change: add it by hand")
