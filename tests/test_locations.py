"""References to a registry: what is one, and when it is spoken to without TLS."""

from __future__ import annotations

import pytest

from cachebuilder.errors import TransferError
from cachebuilder.ship import locations


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("oci://h", "a repository's name"),
        ("oci://h/Upper:v1", "in lower case"),
        ("oci://h/a", "a tag or a digest"),
        ("oci://h/a:b c", "a tag of letters"),
        ("oci://h/a@sha256:12", "64 hexadecimal digits"),
        ("oci:///a:b", "wanted oci://HOST/NAME:TAG"),
        ("oci://h/../a:b", "a repository's name"),
        ("oci://h/a/../b:c", "a repository's name"),
        ("oci://h?x=1/a:b", "wanted oci://HOST/NAME:TAG"),
    ],
)
def test_a_reference_that_is_none_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        locations.parse(text)


def test_a_password_in_a_reference_is_refused_and_not_repeated() -> None:
    with pytest.raises(TransferError, match="with a user in front") as caught:
        locations.parse("oci://me:hunter2@h/a:b")
    assert "hunter2" not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("oci://localhost:5000/a:b", True),
        ("oci://127.0.0.1/a:b", True),
        ("oci://[::1]:5000/a:b", True),
        ("oci://registry.example/a:b", False),
        ("oci://10.0.0.1/a:b", False),
        ("oci+http://10.0.0.1/a:b", True),
        ("oci://localhost.example/a:b", False),
    ],
)
def test_only_loopback_is_spoken_to_without_tls_unasked(text: str, plain: bool) -> None:
    reference = locations.parse(text)
    assert reference.plain is plain and str(reference) == text
