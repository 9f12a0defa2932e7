"""The index and the fingerprint: what is read is what was written, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebuilder import building
from cachebuilder.artifact.index import Entry, File, Fingerprint, Index
from cachebuilder.artifact.read import open_archive, parse_index
from cachebuilder.deepgemm.entries import MAX_BYTES
from cachebuilder.errors import ArtifactError
from cachebuilder.planning.selection import Range, Selection

names = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=20)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
words = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), max_size=50)
numbers = st.integers(0, 2**40)
fingerprints = st.builds(
    Fingerprint,
    generation=st.sampled_from(("legacy", "deepjit")),
    deep_gemm=words,
    headers=digests,
    cutlass=words,
    compiler=words,
    arch=words,
    sm_counts=st.lists(numbers, max_size=3).map(tuple),
    environment=st.dictionaries(
        st.from_regex(r"(DG|DJ)_[A-Z0-9_]{1,9}", fullmatch=True),
        st.text(st.characters(exclude_categories=("C", "Z")), max_size=20),
        max_size=3,
    ),
    distribution=st.none() | words,
    install_include=st.none() | words,
    legacy_flags=st.none() | words,
)
ranges = st.builds(Range, first=numbers, last=numbers, step=numbers)
selections = st.builds(Selection, op=numbers, sm_count=numbers, ranges=st.lists(ranges, max_size=3).map(tuple))


@st.composite
def whole_indexes(draw: st.DrawFn) -> Index:
    fingerprint = draw(fingerprints)
    legacy = fingerprint.generation == "legacy"
    kinds = ("kernel.cu", "kernel.cubin") if legacy else ("kernel.cu", "kernel.cubin", "meta.json", ".committed")
    keys = draw(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), unique=True, max_size=4))
    entries = tuple(
        Entry(
            name=f"{'kernel.' if legacy else ''}{draw(names)}.{key}",
            files=tuple(
                File(name=kind, size=draw(st.integers(0, MAX_BYTES[kind])), sha256=draw(digests)) for kind in kinds
            ),
            selected_by=tuple(draw(st.lists(selections, max_size=2))),
        )
        for key in keys
    )
    return Index(
        schema_version=1,
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)),
        fingerprint=fingerprint,
        fingerprint_digest=fingerprint.digest(),
        manifest=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        ops=tuple(draw(st.lists(st.dictionaries(words, words | numbers | st.none(), max_size=3), max_size=3))),
        entries=entries,
        recorded=draw(st.dictionaries(words, words, max_size=3)),
    )


@pytest.mark.slow
@given(whole_indexes())
def test_an_index_is_what_its_json_says(index: Index) -> None:
    for exclude_none in (True, False):
        for indent in (None, 1):
            data = index.model_dump_json(indent=indent, exclude_none=exclude_none).encode()
            again = parse_index(data, Path("x"))
            # Ops are kept as given but for fields that are none, which are left out.
            assert again.model_copy(update={"ops": ()}) == index.model_copy(update={"ops": ()})
            assert again.ops == index.ops


@given(fingerprints)
def test_a_fingerprint_is_what_its_json_says_and_so_is_its_digest(fingerprint: Fingerprint) -> None:
    again = Fingerprint.model_validate_json(fingerprint.model_dump_json(exclude_none=True).encode())
    assert again == fingerprint and again.digest() == fingerprint.digest()


@pytest.mark.slow
@given(fingerprints, fingerprints)
def test_different_fingerprints_have_different_digests(one: Fingerprint, other: Fingerprint) -> None:
    assert (one == other) == (one.digest() == other.digest())


@pytest.mark.slow
@given(whole_indexes(), st.data())
def test_an_index_with_a_changed_character_is_refused_or_another_index(index: Index, data: st.DataObject) -> None:
    text = bytearray(index.model_dump_json(exclude_none=True).encode())
    position = data.draw(st.integers(0, len(text) - 1))
    text[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte != text[position]))
    try:
        changed = parse_index(bytes(text), Path("x"))
    except ArtifactError:
        return
    assert json.loads(changed.model_dump_json(exclude_none=True)) == json.loads(bytes(text))


def test_the_index_is_packed_as_it_is_written(built: building.Built) -> None:
    with open_archive(built.packed.path) as archive:
        assert archive.index.model_dump_json(indent=1, exclude_none=True).encode() + b"\n" == archive.index_bytes
