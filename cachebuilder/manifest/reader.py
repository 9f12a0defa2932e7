"""Reads a manifest's YAML: plain values, each with its line, under limits that hold before the work is done.

A manifest may come with an artifact from anybody. So it is the YAML that a person writes: no anchors and aliases, with
which 400 bytes become gigabytes, no tags and no merge keys, and no more nodes and nesting than a manifest can need.
"""

from __future__ import annotations

import io
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.parser import AliasEvent
from ruamel.yaml.scanner import Scanner

#: A manifest is about a page of shapes, and perhaps thousands of kernel sources of a page each.
MAX_BYTES = 4 << 20
#: Scalars, lists and mappings. A source has five nodes, an op with all its fields has 30; a manifest of DeepSeek-V3 has
#: 300. ruamel.yaml reads some 10,000 a second.
MAX_NODES = 32_768
#: Lines, and words of plain and quoted values: what ruamel.yaml spends its time on in a text of few nodes. A source has
#: some 25 lines.
_MAX_LINES, _MAX_WORDS = 131_072, 524_288
#: A manifest's deepest value, ``ops[0].sm_counts[0]``, is at level 5.
_MAX_DEPTH = 16

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp"))


class TextError(ValueError):
    """Text that is not a manifest's YAML: why, and the line, counted from 1."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


@dataclass(frozen=True)
class Tree:
    """A text's values as built-in types, and the nodes that know their lines; None for an empty text."""

    value: Any
    root: Node | None

    def line(self, location: tuple[Any, ...]) -> int:
        """The line, counted from 1, of the value at ``location``, or of its nearest parent that is in the text.

        Parts of ``location`` that are in no list or mapping are skipped: pydantic adds the name of an op.
        """
        line, node = 1, self.root
        for part in location:
            for place, key, value in _children(node):
                if key == part:
                    line, node = place.start_mark.line + 1, value
                    break
        return line


def read(data: bytes) -> Tree:
    """The values in a manifest's text.

    Raises:
        TextError: it is not UTF-8 or not YAML, or it has what no manifest needs.
    """
    if len(data) > MAX_BYTES:
        raise TextError(1, f"wanted at most {MAX_BYTES} bytes, found {len(data)}")
    yaml = YAML(typ="safe", pure=True)
    yaml.Scanner, yaml.Composer = _BoundedScanner, _PlainComposer
    try:
        text = data.decode("utf-8")
        if (count := len(text.splitlines())) > _MAX_LINES:
            raise TextError(_MAX_LINES, f"wanted at most {_MAX_LINES} lines, found {count}")
        root = yaml.compose(io.StringIO(text))
        return Tree(_value(root, yaml.constructor) if root else None, root)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(line, f"wanted UTF-8 text, found byte {data[error.start]:#x} at {error.start}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise TextError(mark.line + 1 if mark else 1, f"not YAML: {error.problem}") from None
    except (YAMLError, RecursionError) as error:
        raise TextError(1, f"not YAML: {error}") from None


class _BoundedScanner(Scanner):
    """A scanner that ends at too deep a nesting, whose cost grows with its square, and at too many words."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self._words = 0

    def fetch_flow_collection_start(self, TokenClass: Any, to_push: str) -> None:
        """Take ``[`` or ``{``."""
        if self.flow_level >= _MAX_DEPTH:
            raise _too_deep(self.reader.get_mark())
        super().fetch_flow_collection_start(TokenClass, to_push)

    def scan_plain_spaces(self, indent: Any, start_mark: Any) -> Any:
        """Take the spaces behind a word of a plain value."""
        self._count_word()
        return super().scan_plain_spaces(indent, start_mark)

    def scan_flow_scalar_spaces(self, double: Any, start_mark: Any) -> Any:
        """Take the spaces behind a word of a quoted value."""
        self._count_word()
        return super().scan_flow_scalar_spaces(double, start_mark)

    def _count_word(self) -> None:
        self._words += 1
        if self._words > _MAX_WORDS:
            raise _refusal(self.reader.get_mark(), f"wanted at most {_MAX_WORDS} words outside of blocks, found more")


class _PlainComposer(Composer):
    """A composer that refuses what no manifest needs as soon as it comes."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Take the next node."""
        event, self._nodes = self.parser.peek_event(), self._nodes + 1
        if isinstance(event, AliasEvent) or event.anchor is not None:
            raise _refusal(event.start_mark, f"wanted no anchors and no aliases, found {event.anchor[:60]!r}")
        if event.ctag is not None:
            raise _refusal(event.start_mark, f"wanted no tags, found {str(event.ctag)[:60]!r}")
        if self._nodes > MAX_NODES:
            raise _refusal(event.start_mark, f"wanted at most {MAX_NODES} values, lists and mappings, found more")
        if self.depth >= _MAX_DEPTH:
            raise _too_deep(event.start_mark)
        return super().compose_node(parent, index)


def _refusal(mark: StringMark, why: str) -> TextError:
    return TextError(mark.line + 1, why)


def _too_deep(mark: StringMark) -> TextError:
    return _refusal(mark, f"wanted at most {_MAX_DEPTH} levels of lists and mappings, found more")


def _children(node: Node | None) -> list[tuple[Node, Hashable, Node]]:
    """Of each child: the node that stands for its line, its key or its position, its node."""
    if isinstance(node, MappingNode):
        return [(key, key.value, value) for key, value in node.value]
    return [(item, index, item) for index, item in enumerate(node.value)] if isinstance(node, SequenceNode) else []


def _value(node: Node, constructor: Any) -> Any:
    if isinstance(node, SequenceNode):
        return [_value(item, constructor) for item in node.value]
    if isinstance(node, MappingNode):
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise _refusal(key_node.start_mark, "wanted a name as key, found a list or a mapping")
            key = _value(key_node, constructor)
            if key in mapping:
                raise _refusal(key_node.start_mark, f"wanted each key once, found a duplicate key: {str(key)[:60]!r}")
            mapping[key] = _value(value_node, constructor)
        return mapping
    if str(node.ctag) not in _SCALARS:
        raise _refusal(node.start_mark, f"wanted a text or a number, found {node.value[:60]!r}")
    try:
        return constructor.construct_object(node)
    except ValueError as error:  # a number of thousands of digits, or no date
        raise _refusal(node.start_mark, f"not YAML: {error}") from None
