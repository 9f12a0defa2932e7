"""A machine whose disk is full or whose clock is wrong: the error says which, and nothing is left."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import os
import resource
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cachebuilder.errors import RestoreError, TransferError
from cachebuilder.ship import locations
from cachebuilder.ship.pull import Puller
from tests.registries import Registry
from tests.test_bad_days import GENERATIONS, ONCE, left
from tests.test_registry import pull_from, push_to

__all__ = ["GENERATIONS"]


# A full disk


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["pull", "restore"])
def test_a_full_disk_is_reported_and_nothing_is_left(
    verb: str, there: Registry, artifact: Path, tmp_path: Path
) -> None:
    """The limit on a file's size stands for it: the same call fails, at the same place, with another number."""
    push_to(there.host, "bad", artifact)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    where = ["-o", str(tmp_path / "d" / "a.tar.zst")] if verb == "pull" else ["--to", str(tmp_path / "d")]
    done = subprocess.run(
        [sys.executable, "-m", "cachebuilder", verb, f"oci://{there.host}/bad:v1", *where],
        preexec_fn=limit, capture_output=True, text=True, check=False,
        env=os.environ | {"CACHEBUILDER_CACHE_DIR": str(tmp_path / "c"), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 10 and "cannot be written: File too large" in done.stderr, done.stderr
    assert "hint: make room" in done.stderr
    assert left(tmp_path / "d") == left(tmp_path / "c") == []


def test_a_disk_that_is_really_full_is_reported(there: Registry, artifact: Path, tmp_path: Path) -> None:
    push_to(there.host, "bad", artifact)
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("wants to mount a small tmpfs, which this machine does not allow")
    try:
        with pytest.raises(RestoreError, match="cannot be written: No space left on device"):
            pull_from(f"oci://{there.host}/bad:v1", disk)
        assert left(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 3000])
def test_a_full_disk_in_the_working_folder_of_a_plan_is_one_sentence(limit: int, small: Path, tmp_path: Path) -> None:
    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "cachebuilder", "plan", small], preexec_fn=limit_files, capture_output=True, text=True,
        env=os.environ | {"CACHEBUILDER_CACHE_DIR": str(tmp_path / "c"), "PYTHONDONTWRITEBYTECODE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode in (4, 6) and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr
    assert left(tmp_path / "c") == []


@pytest.mark.parametrize("verb", ["misses", "cache dir", "gpus"])
def test_output_that_goes_to_a_full_disk_is_one_sentence(verb: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"kernel": "x"}\n')
    more = [tmp_path / "log"] if verb == "misses" else []
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "cachebuilder", *verb.split(), *more]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stderr == "error: the output: cannot be written: No space left on device\nhint: make room\n"


# A wrong clock


@pytest.mark.parametrize(("first", "last", "words"), [(1, 2, "not yet valid"), (-2, -1, "expired")])
def test_a_clock_that_is_wrong_is_what_the_hint_speaks_of(
    first: int, last: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate of another time is what a machine with a wrong clock sees."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + datetime.timedelta(days=first))
        .not_valid_after(now + datetime.timedelta(days=last))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "both.pem"
    kind, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    public = certificate.public_bytes(serialization.Encoding.PEM)
    pem.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, none) + public)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
    reference = locations.Reference(f"127.0.0.1:{server.server_address[1]}", "a", "b", None, plain=False)
    try:
        with pytest.raises(TransferError, match=words) as caught:
            Puller(reference, ONCE).look_up()
    finally:
        server.shutdown()
        server.server_close()
    assert "check this machine's clock" in str(caught.value.hint)
