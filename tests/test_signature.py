"""Signatures: in standard forms, and checked before anything is read."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import zstandard

from cachebuilder import building
from cachebuilder.artifact import provenance, signature
from cachebuilder.artifact.index import PROVENANCE_SUFFIX, SIGNATURE_SUFFIX
from cachebuilder.artifact.trust import Trust
from cachebuilder.errors import ArtifactError, SignatureError
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import Restored, restore
from tests.archives import snapshot
from tests.conftest import Run
from tests.odd import make_odd

#: One of the two: what is signed is bytes, whichever DeepGEMM made them.
GENERATIONS = ("deepjit",)


def openssl(*arguments: str | Path, data: bytes | None = None) -> bytes:
    done = subprocess.run(["openssl", *map(str, arguments)], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two key pairs: ours.pem and other.pem."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours.pem", "other.pem"):
        signature.generate_key(folder / name)
    return folder


@pytest.fixture
def artifact(built: building.Built, keys: Path, tmp_path: Path) -> Path:
    """A signed artifact with its statement."""
    path = tmp_path / "small.tar.zst"
    data = built.packed.path.read_bytes()
    path.write_bytes(data)
    sign(path, keys)
    return path


def sign(path: Path, keys: Path, statement: bool = True) -> None:
    """What `cachebuilder sign` does, whatever the bytes are."""
    key = signature.load_key(keys / "ours.pem")
    data = path.read_bytes()
    beside(path, SIGNATURE_SUFFIX).write_bytes(signature.sign(data, key))
    if statement:
        beside(path, PROVENANCE_SUFFIX).write_bytes(provenance.seal(provenance.statement(path, data), key))


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def trusted(keys: Path, *names: str) -> Trust:
    return Trust.load([keys / name for name in names or ("ours.pub",)])


def unpack(artifact: Path, to: Path, trust: Trust | None = None) -> Restored:
    """A restore with no DeepGEMM: what fits is not what these tests are about."""
    return restore([artifact], to, machine=Machine(None), force=True, trust=trust)


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# Standard forms


def test_openssl_verifies_what_the_command_line_signed(built: building.Built, run: Run, tmp_path: Path) -> None:
    key, path = tmp_path / "k.pem", tmp_path / "small.tar.zst"
    path.write_bytes(built.packed.path.read_bytes())
    assert run("keygen", "--out", key).returncode == 0
    done = run("sign", path, "--key", key)
    assert done.returncode == 0 and built.packed.sha256 in done.stdout, done.stderr
    openssl("base64", "-d", "-A", "-in", beside(path, SIGNATURE_SUFFIX), "-out", tmp_path / "der")
    shown = openssl("dgst", "-sha256", "-verify", tmp_path / "k.pub", "-signature", tmp_path / "der", path)
    assert b"Verified OK" in shown
    done = run("verify-signature", path, "--trust", tmp_path / "k.pub")
    der = openssl("pkey", "-pubin", "-in", tmp_path / "k.pub", "-outform", "DER")
    assert done.returncode == 0 and hashlib.sha256(der).hexdigest() in done.stdout, done.stderr


@pytest.mark.parametrize("lines", [["-A"], []], ids=["one-line", "wrapped"])
def test_a_key_and_a_signature_of_openssl_are_taken(artifact: Path, lines: list[str], tmp_path: Path) -> None:
    key, public = tmp_path / "o.pem", tmp_path / "o.pub"
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    der = openssl("dgst", "-sha256", "-sign", key, artifact)
    beside(artifact, SIGNATURE_SUFFIX).write_bytes(openssl("base64", *lines, data=der))
    beside(artifact, PROVENANCE_SUFFIX).unlink()
    assert unpack(artifact, tmp_path / "dir", Trust.load([public])).written
    assert signature.load_key(key).key_size == 256


def test_openssl_verifies_the_statement_over_an_encoding_written_down_here(
    artifact: Path, keys: Path, built: building.Built, tmp_path: Path
) -> None:
    envelope = json.loads(beside(artifact, PROVENANCE_SUFFIX).read_bytes())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    # https://github.com/secure-systems-lab/dsse/blob/master/protocol.md: PAE
    (tmp_path / "pae").write_bytes(
        b"DSSEv1 " + str(len(kind)).encode() + b" " + kind + b" " + str(len(payload)).encode() + b" " + payload
    )
    (tmp_path / "der").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    openssl("dgst", "-sha256", "-verify", keys / "ours.pub", "-signature", tmp_path / "der", tmp_path / "pae")
    statement = json.loads(payload)
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    assert statement["subject"] == [{"name": artifact.name, "digest": {"sha256": built.packed.sha256}}]
    build = statement["predicate"]["buildDefinition"]
    manifest, deep_gemm, nvcc = build["resolvedDependencies"]
    assert manifest["digest"]["sha256"] == hashlib.sha256(built.inputs.manifest_bytes).hexdigest()
    assert deep_gemm["annotations"]["version"] == built.inputs.installation.version
    assert base64.b64decode(nvcc["content"]).decode() == built.inputs.toolchain.version_text
    assert build["internalParameters"]["kernels"] == len(built.plan.kernels)


def test_a_report_of_the_gpu_is_named_and_must_be_about_this_artifact(artifact: Path, keys: Path) -> None:
    report = beside(artifact, ".verified.json")
    report.write_text(json.dumps({"artifact": {"sha256": hashlib.sha256(artifact.read_bytes()).hexdigest()}}))
    sign(artifact, keys)
    statement = trusted(keys).check_file(artifact).statement
    assert statement is not None
    listed = statement["predicate"]["runDetails"]["byproducts"][1]
    assert listed == {
        "name": report.name,
        "digest": {"sha256": hashlib.sha256(report.read_bytes()).hexdigest()},
    }
    assert provenance.check_report_beside(artifact, statement) == report.name
    report.write_text(json.dumps({"artifact": {"sha256": "0" * 64}}))
    with pytest.raises(SignatureError, match="not the report that was signed"):
        provenance.check_report_beside(artifact, statement)
    with pytest.raises(ArtifactError, match="is about another artifact"):
        provenance.statement(artifact, artifact.read_bytes())


# Refused, before anything is read


Change = Callable[[Path, Path], object]


def flipped(suffix: str, bit: int) -> Change:
    def change(path: Path, keys: Path) -> None:
        file = beside(path, suffix) if suffix else path
        data = file.read_bytes()
        file.write_bytes(flip(data, bit % (8 * len(data))))

    return change


def resigned_by_another(path: Path, keys: Path) -> None:
    key = signature.load_key(keys / "other.pem")
    beside(path, SIGNATURE_SUFFIX).write_bytes(signature.sign(path.read_bytes(), key))


def statement_by_another(path: Path, keys: Path) -> None:
    content = provenance.statement(path, path.read_bytes())
    key = signature.load_key(keys / "other.pem")
    beside(path, PROVENANCE_SUFFIX).write_bytes(provenance.seal(content, key))


def statement_of_another(path: Path, keys: Path) -> None:
    content = provenance.statement(path, path.read_bytes())
    content["subject"][0]["digest"]["sha256"] = "0" * 64
    key = signature.load_key(keys / "ours.pem")
    beside(path, PROVENANCE_SUFFIX).write_bytes(provenance.seal(content, key))


def a_fifo(path: Path, keys: Path) -> None:
    beside(path, SIGNATURE_SUFFIX).unlink()
    os.mkfifo(beside(path, SIGNATURE_SUFFIX))


REFUSED = [
    ("unsigned", lambda path, keys: beside(path, SIGNATURE_SUFFIX).unlink(), "small.tar.zst: not signed"),
    ("artifact-first-bit", flipped("", 0), "the signature is not valid"),
    ("artifact-last-bit", flipped("", -1), "the signature is not valid"),
    ("artifact-longer", lambda path, keys: path.write_bytes(path.read_bytes() + b"\0"), "is not valid"),
    ("artifact-garbage", lambda path, keys: path.write_bytes(b"garbage"), "the signature is not valid"),
    ("signature-first-bit", flipped(SIGNATURE_SUFFIX, 0), "a signature in base64|is not valid"),
    ("signature-empty", lambda path, keys: beside(path, SIGNATURE_SUFFIX).write_bytes(b""), "a signature in base64"),
    ("signature-huge", lambda path, keys: beside(path, SIGNATURE_SUFFIX).write_bytes(bytes(1 << 20)), "wanted at most"),
    ("signature-a-fifo", a_fifo, "wanted a regular file"),
    ("another-key", resigned_by_another, "signed with another key"),
    ("statement-first-bit", flipped(PROVENANCE_SUFFIX, 0), "a DSSE envelope"),
    ("statement-inside", flipped(PROVENANCE_SUFFIX, 8 * 400), "signature is not valid|a DSSE envelope"),
    ("statement-by-another-key", statement_by_another, "small.tar.zst: provenance: the signature is not valid"),
    ("statement-of-another-artifact", statement_of_another, "is about another artifact"),
]


@pytest.mark.parametrize(("change", "words"), [pytest.param(c, w, id=i) for i, c, w in REFUSED])
def test_it_is_refused_before_anything_is_decompressed_and_dir_is_as_before(
    change: Change, words: str, artifact: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(artifact, keys)
    to = tmp_path / "dir"
    (to / "cache").mkdir(parents=True)
    (to / "cache" / "mine").write_text("mine")
    before = snapshot(to)
    fail = lambda *_, **__: pytest.fail("decompressed before its signature was checked")  # noqa: E731
    monkeypatch.setattr(zstandard, "ZstdDecompressor", fail)
    with pytest.raises(SignatureError, match=words):
        unpack(artifact, to, trusted(keys))
    assert snapshot(to) == before


def test_garbage_after_signing_is_refused_for_its_signature_and_signed_garbage_as_an_artifact(
    artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    artifact.write_bytes(b"no zstd at all")
    here = ("restore", artifact, "--to", tmp_path / "dir", "--force", "--trust", keys / "ours.pub")
    done = run(*here)
    assert done.returncode == 14 and "the signature is not valid" in done.stderr and "zstd" not in done.stderr
    beside(artifact, PROVENANCE_SUFFIX).unlink()
    sign(artifact, keys, statement=False)
    done = run(*here)
    assert done.returncode == 8 and "zstd" in done.stderr
    assert not (tmp_path / "dir").exists()


def test_no_flipped_bit_of_a_signature_or_an_envelope_is_taken(artifact: Path, keys: Path) -> None:
    trust, data = trusted(keys).keys, artifact.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    text, envelope = (beside(artifact, suffix).read_bytes() for suffix in (SIGNATURE_SUFFIX, PROVENANCE_SUFFIX))
    assert signature.check(data, text, trust, "x") is trust[0]
    assert provenance.open_envelope(envelope, trust, sha256, "x")
    for bit in range(8 * len(text)):
        with pytest.raises(SignatureError):
            signature.check(data, flip(text, bit), trust, "x")
    for byte in range(len(envelope)):  # one bit of each byte, each bit in turn
        with pytest.raises(SignatureError):
            provenance.open_envelope(flip(envelope, 8 * byte + byte % 8), trust, sha256, "x")


def test_a_second_spelling_of_the_same_bytes_in_base64_is_not_taken(artifact: Path, keys: Path) -> None:
    """The bits behind the last byte are nobody's: ``QQ==`` and ``QR==`` decode to the same."""
    content, key = provenance.statement(artifact, artifact.read_bytes()), signature.load_key(keys / "ours.pem")
    sha256, trust = content["subject"][0]["digest"]["sha256"], trusted(keys).keys
    envelopes = [json.loads(provenance.seal(content | {"pad": "x" * n}, key)) for n in range(3)]
    envelope = next(one for one in envelopes if one["payload"].endswith("=="))
    assert provenance.open_envelope(json.dumps(envelope).encode(), trust, sha256, "x")
    other = envelope["payload"][:-3] + chr(ord(envelope["payload"][-3]) + 1) + "=="
    assert base64.b64decode(other) == base64.b64decode(envelope["payload"])
    with pytest.raises(SignatureError, match="wanted a DSSE envelope"):
        provenance.open_envelope(json.dumps(envelope | {"payload": other}).encode(), trust, sha256, "x")


@pytest.mark.parametrize(
    "envelope",
    [b"", b"[]", b"{", b"[" * 100_000, b'{"payloadType":1,"payload":2,"signatures":3}', b"\xff", b"null"],
)
def test_an_envelope_of_anything_else_is_one_sentence(envelope: bytes, keys: Path) -> None:
    with pytest.raises(SignatureError, match="wanted a DSSE envelope"):
        provenance.open_envelope(envelope, trusted(keys).keys, "0" * 64, "x")


def test_no_trusted_key_trusts_nobody(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="wanted: these bytes, signed with no key"):
        unpack(artifact, tmp_path / "dir", Trust(()))


def test_one_of_several_trusted_keys_is_enough(artifact: Path, keys: Path, tmp_path: Path) -> None:
    trust = trusted(keys, "other.pub", "ours.pub")
    assert unpack(artifact, tmp_path / "dir", trust).signed_by is trust.keys[1]


# Keys


def test_a_private_key_is_for_its_owner_only_whatever_the_umask_and_is_never_overwritten(tmp_path: Path) -> None:
    key = tmp_path / "k.pem"
    old = os.umask(0)
    try:
        public = signature.generate_key(key)
    finally:
        os.umask(old)
    assert (stat.S_IMODE(key.stat().st_mode), stat.S_IMODE(public.stat().st_mode)) == (0o600, 0o644)
    before = snapshot(tmp_path)
    with pytest.raises(SignatureError, match="never overwritten"):
        signature.generate_key(key)
    assert snapshot(tmp_path) == before
    key.unlink()
    with pytest.raises(SignatureError, match=r"k\.pub: wanted no file"):
        signature.generate_key(key)
    assert not key.exists(), "half a pair is left"
    (tmp_path / "link.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match="never overwritten"):
        signature.generate_key(tmp_path / "link.pem")


def test_an_encrypted_key_wants_its_passphrase(artifact: Path, run: Run, tmp_path: Path) -> None:
    key = tmp_path / "k.pem"
    assert run("keygen", "--out", key, "--passphrase", CACHEBUILDER_KEY_PASSPHRASE="right").returncode == 0
    assert b"ENCRYPTED PRIVATE KEY" in key.read_bytes()
    openssl("pkey", "-in", key, "-passin", "pass:right", "-noout")
    wrong = run("sign", artifact, "--key", key, CACHEBUILDER_KEY_PASSPHRASE="wrong")
    assert wrong.returncode == 14 and "the passphrase is wrong" in wrong.stderr
    right = run("sign", artifact, "--key", key, CACHEBUILDER_KEY_PASSPHRASE="right")
    assert right.returncode == 0, right.stderr
    empty = run("keygen", "--out", tmp_path / "e.pem", "--passphrase", CACHEBUILDER_KEY_PASSPHRASE="")
    assert empty.returncode == 14 and not (tmp_path / "e.pem").exists()


def test_a_key_of_another_kind_is_refused_with_what_was_wanted(keys: Path, tmp_path: Path) -> None:
    rsa, p384 = tmp_path / "rsa.pem", tmp_path / "p384.pem"
    openssl("genpkey", "-algorithm", "RSA", "-out", rsa)
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384", "-out", p384)
    two = tmp_path / "two.pub"
    two.write_bytes((keys / "ours.pub").read_bytes() + (keys / "other.pub").read_bytes())
    for file, words in ((rsa, "RSA"), (p384, "secp384r1")):
        with pytest.raises(SignatureError, match=f"wanted an ECDSA P-256 key, found {words}"):
            signature.load_key(file)
        openssl("pkey", "-in", file, "-pubout", "-out", file.with_suffix(".pub"))
        with pytest.raises(SignatureError, match=f"wanted an ECDSA P-256 key, found {words}"):
            signature.load_trusted([file.with_suffix(".pub")])
    for file, words in (
        (keys / "ours.pem", "found a private one"),
        (two, "wanted one public key in PEM, found 2"),
        (tmp_path / "none", "found no file"),
        (Path(__file__), "wanted"),
    ):
        with pytest.raises(SignatureError, match=words):
            signature.load_trusted([file])


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o777])
def test_a_private_key_that_others_can_read_is_refused(mode: int, artifact: Path, run: Run, tmp_path: Path) -> None:
    key = tmp_path / "k.pem"
    signature.generate_key(key)
    key.chmod(mode)
    before = snapshot(tmp_path)
    done = run("sign", artifact, "--key", key)
    assert done.returncode == SignatureError.exit_code and f"found mode {mode:04o}" in done.stderr, done.stderr
    assert f"hint: chmod 600 {key}" in done.stderr and snapshot(tmp_path) == before
    key.chmod(0o400)
    signature.load_key(key)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to /dev/zero", "huge", "loop"])
@pytest.mark.parametrize(
    "what", ["key", "public key", SIGNATURE_SUFFIX, PROVENANCE_SUFFIX, "artifact", ".verified.json"]
)
def test_a_file_that_is_a_folder_or_never_ends_is_an_error(
    kind: str, what: str, artifact: Path, keys: Path, tmp_path: Path
) -> None:
    odd = {"key": tmp_path / "k.pem", "public key": tmp_path / "k.pub", "artifact": artifact}.get(what)
    odd = odd or beside(artifact, what)
    make_odd(kind, odd)
    with pytest.raises((SignatureError, ArtifactError), match=r"wanted|cannot be read"):
        if what == "key":
            signature.load_key(odd)
        elif what == "public key":
            signature.load_trusted([odd])
        elif what == ".verified.json":
            provenance.sign_file(artifact, signature.load_key(keys / "ours.pem"))
        else:
            trusted(keys).check_file(artifact)


def test_a_full_disk_leaves_no_empty_key_behind(tmp_path: Path) -> None:
    """A file may have 0 bytes here, as on a full disk."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
        "from cachebuilder.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "keygen", "--out", str(tmp_path / "k.pem")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == SignatureError.exit_code and "cannot be written" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_broken_signature_in_an_envelope_does_not_hide_a_valid_one(artifact: Path, keys: Path) -> None:
    path = beside(artifact, PROVENANCE_SUFFIX)
    envelope = json.loads(path.read_bytes())
    broken = [None, 1, {}, {"sig": 1}, {"sig": "?"}, {"sig": "", "more": 1}, {"keyid": "x", "sig": "QUJD"}]
    envelope["signatures"] = [*broken, *envelope["signatures"]]
    path.write_text(json.dumps(envelope))
    assert trusted(keys).check_file(artifact).statement is not None


def test_the_provenance_lists_what_the_build_used(built: building.Built, artifact: Path, keys: Path) -> None:
    source, record = beside(built.packed.path, ".build.json"), beside(artifact, ".build.json")
    record.write_bytes(source.read_bytes())
    key = signature.load_key(keys / "ours.pem")
    provenance.sign_file(artifact, key)
    statement = trusted(keys).check_file(artifact).statement
    assert statement is not None
    listed = {item["name"]: item for item in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {
        "cachebuilder",
        "torch",
        "sgl-deep-gemm",
        "nvcc",
        "ptxas",
        "zstandard",
        "pydantic",
        "triton",
    } <= listed.keys()
    version = metadata.version("torch")
    assert (
        listed["torch"]["uri"] == f"pkg:pypi/torch@{version}" and listed["torch"]["annotations"]["version"] == version
    )
    nvcc = built.inputs.toolchain.nvcc.read_bytes()
    assert listed["nvcc"]["digest"] == {"sha256": hashlib.sha256(nvcc).hexdigest()}
    assert all(item.keys() & {"uri", "digest", "content"} for item in listed.values())
    other = json.loads(record.read_bytes()) | {"artifact": "0" * 64}
    record.write_text(json.dumps(other))
    assert "pkg:pypi/torch" not in json.dumps(provenance.statement(artifact, artifact.read_bytes()))
    for odd in (
        "[]",
        "{",
        json.dumps({"artifact": built.packed.sha256, "materials": [{"name": "\x1b", "version": "1"}]}),
    ):
        record.write_text(odd)
        with pytest.raises(ArtifactError, match="wanted the record of a build"):
            provenance.sign_file(artifact, key)


def test_a_damaged_artifact_is_not_signed(artifact: Path, keys: Path, run: Run) -> None:
    artifact.write_bytes(artifact.read_bytes()[:-1])
    before = beside(artifact, SIGNATURE_SUFFIX).read_bytes()
    done = run("sign", artifact, "--key", keys / "ours.pem")
    assert done.returncode == 8 and "truncated" in done.stderr
    assert beside(artifact, SIGNATURE_SUFFIX).read_bytes() == before
