"""Mutates what a registry answers, and docker's config: each must be taken right or be refused, never crash, hang or stray.

    python tests/fuzz_registry.py ARTIFACT [MUTATIONS] [SEED] [DEEP_GEMM]

A real server on loopback holds the artifact, signed. Four kinds of runs, the last one less often, since it has thirty requests:

- a pull, of one image or of an index of two, with trusted keys or without;
- a sync of the same into a folder that may have a generation already;
- a pull that needs a login: a mutated docker config, and mutated challenges and tokens;
- a push of the artifact, with its signature and the list of referrers.

In each run one to three answers are changed: the status, headers (lengths, types, digests, redirects, challenges), the
JSON's tree, with its digest right again, or any byte of the whole answer. An audit hook ends the process at a file that
is made outside the folder and at a program that is no credential helper; an alarm ends it at a run of 10 s; a limit at
one that takes 1 GiB. Prints one JSON object; ``refusals`` counts the different sentences.
"""

from __future__ import annotations

import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cachebuilder.artifact import provenance, signature
from cachebuilder.artifact.trust import Trust
from cachebuilder.common.folders import Folder
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import CacheBuilderError
from cachebuilder.restoring.machine import Machine
from cachebuilder.ship import credentials, fetch, image, locations
from cachebuilder.ship.description import BESIDE, SIGNATURE
from cachebuilder.ship.documents import INDEX, MANIFEST, Descriptor, digest_of, index_document
from cachebuilder.ship.push import push
from cachebuilder.ship.retry import Patience, Retries
from cachebuilder.ship.sync import SyncedFolder
from tests.fuzz_archives import edit_tree, guard, mutate
from tests.registries import Raw
from tests.shipping import into

_MEMORY_BYTES = 1 << 30
_SECONDS = 10
#: No second try, whose wait the server chooses; a fifth of a second for headers, and a MiB a second.
HASTY = Retries(0, patience=Patience(0.2, 1 << 20))

#: A push looks again after a broken connection, so that it asks how far it came.
PUSHY = Retries(1, first_wait=0.001, patience=HASTY.patience)

_TEXTS = (
    *("0-1", "0-\u00b2", "0-" + "9" * 5000, "bytes=0-5", "0-0"),
    *(
        "",
        "0",
        "-1",
        "1",
        "9" * 400,
        "1e9",
        "\\u00e9",
        "\xff",
        "a" * 70_000,
        "\x00",
        "%",
        "%00",
        "é",
        "chunked",
        "gzip",
    ),
    *("bytes 0-", "bytes 5-", "bytes 0-0/1", "sha256:" + "0" * 64, "sha256:", "md5:0", MANIFEST, INDEX, "text/html"),
)
_LOCATIONS = (
    *("", "/", "//", "///", "http://", "http://[", "http://[::1", "http://h:99999/", "file:///etc/passwd", "ftp://h/"),
    *(
        "https://{host}/",
        "http://{host}/v2/a/manifests/v1",
        "//{host}/v2/",
        "http://u:p@{host}/x",
        "http://{host}\\@h/",
    ),
    *(
        "http://\u00e9.example/",
        "http://{host}/%zz",
        "http://{host}/" + "a" * 9000,
        "../../..",
        "?",
        "#",
        "javascript:1",
    ),
)
_CHALLENGES = (
    *(
        "",
        "Basic",
        "Bearer",
        "Bearer realm",
        'Bearer realm=""',
        'Bearer realm="token"',
        'Basic realm="x"',
        "Negotiate x",
    ),
    *('Bearer realm="http://{host}/token",service="s",scope="repository:a:pull"', 'bearer REALM="http://{host}/token"'),
    *(
        'Bearer realm="http://[",service="s"',
        'Bearer realm="https://{host}/token"',
        'Bearer realm="file:///etc/passwd"',
    ),
    *('Bearer realm="http://u:p@{host}/token"', 'Bearer realm="http://{host}\\@h/token"', "Bearer " + 'a="b",' * 9000),
)
_HEADERS = (
    *(
        "Content-Length",
        "Content-Type",
        "Transfer-Encoding",
        "Content-Encoding",
        "Docker-Content-Digest",
        "Retry-After",
    ),
    *("Content-Range", "Location", "WWW-Authenticate", "Set-Cookie", "Connection", "OCI-Subject", "Range", "X"),
)
_STATUSES = (
    *(100, 101, 199, 200, 201, 202, 204, 206, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404),
    *(407, 416, 418, 429, 500, 503, 599, 999),
)


@dataclass
class Answered:
    """One answer, before it is made bytes of."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        headers = {"Content-Length": str(len(self.body)), "Connection": "close"} | self.headers
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {self.status} Said\r\n{head}\r\n".encode("utf-8", "surrogateescape") + self.body


class Images:
    """What an honest registry answers: an image with a signature, and an index of two images."""

    def __init__(self, artifact: Path) -> None:
        made = image.make(artifact, artifact.read_bytes(), ("linux/amd64", "linux/arm64"))
        self.artifact = artifact.read_bytes()
        self.blobs = {made.layer.digest: self.artifact} | {blob.digest: data for blob, data in made.blobs}
        self.manifests = {entry.digest: data for entry, data in made.manifests}
        self.index = index_document([entry for entry, _ in made.manifests])
        self.tags = {"one": made.manifests[0][1], "two": self.index}
        self.referrers: dict[str, bytes] = {}
        files = []
        for suffix, (media_type, _) in BESIDE.items():
            beside = artifact.with_name(artifact.name + suffix)
            if beside.exists():
                files.append(Descriptor.of(media_type, beside.read_bytes()))
                self.blobs[files[-1].digest] = beside.read_bytes()
        for subject, _ in made.manifests:
            entry, data = image.attachment(SIGNATURE, subject, files)
            self.manifests[entry.digest] = data
            self.referrers[subject.digest] = index_document([entry])

    def answer(self, path: str) -> Answered:
        kind, _, name = path.removeprefix("/v2/a/").partition("/")
        if kind == "blobs" and name in self.blobs:
            return Answered(200, self.blobs[name])
        documents = {"manifests": self.manifests | self.tags, "referrers": self.referrers}.get(kind, {})
        if name in documents:
            data = documents[name]
            media_type = INDEX if b'"manifests"' in data else MANIFEST
            return Answered(200, data, {"Content-Type": media_type, "Docker-Content-Digest": digest_of(data)})
        return Answered(404, b'{"errors":[{"code":"UNKNOWN","message":"none"}]}')


class Fuzz:
    """One artifact's mutations."""

    def __init__(self, artifact: Path, seed: int, machine: Machine, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.machine, self.folder = machine, folder
        signature.generate_key(folder / "k.pem")
        copy = folder / "small.tar.zst"
        shutil.copy(artifact, copy)
        provenance.sign_file(copy, signature.load_key(folder / "k.pem"))
        self.artifact = copy
        self.trust = Trust.load([folder / "k.pub"])
        self.images = Images(copy)
        self.plan: dict[int, Callable[[Answered], bytes]] = {}
        self.asked, self.login = 0, False
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.refusals: set[str] = set()
        self.server = Raw(self.serve)
        self.got, self.synced = folder / "got", folder / "synced"

    def serve(self, connection: socket.socket, head: bytes) -> None:
        method, path = head.split()[0], head.split()[1].decode("latin-1").partition("?")[0]
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        missing = int(length[1]) - len(head.partition(b"\r\n\r\n")[2]) if length else 0
        while missing > 0 and (part := connection.recv(1 << 20)):
            missing -= len(part)
        if method in (b"POST", b"PATCH", b"PUT"):
            statuses = {b"POST": 202, b"PATCH": 202, b"PUT": 201}
            headers = {"Location": "/v2/a/blobs/uploads/1", "Range": "0-9"}
            answered = Answered(statuses[method], b"", headers)
        elif path.startswith("/v2/a/blobs/uploads/"):  # a push asks how far it came
            answered = Answered(204, b"", {"Location": path, "Range": "0-9"})
        elif path == "/token":
            answered = Answered(200, b'{"token": "t", "expires_in": 60}')
        elif self.login and b"\r\nauthorization:" not in head.lower():
            realm = f'Bearer realm="http://{self.server.host}/token",service="s",scope="repository:a:pull"'
            answered = Answered(401, b"{}", {"WWW-Authenticate": realm})
        else:
            answered = self.images.answer(path)
        self.asked += 1
        change = self.plan.get(self.asked)
        data = answered.encoded() if change is None else change(answered)
        connection.settimeout(2)
        connection.sendall(data)

    # One answer

    def text(self, texts: tuple[str, ...]) -> str:
        return self.chance.choice(texts).replace("{host}", self.server.host)

    def changed(self, answered: Answered) -> bytes:
        """An answer with one change, as bytes."""
        chance = self.chance
        match chance.randrange(8):
            case 0:
                return mutate(answered.encoded(), chance)
            case 1:
                answered.status = chance.choice(_STATUSES)
                if answered.status in (301, 302, 303, 307, 308):
                    answered.headers["Location"] = self.text(_LOCATIONS)
                if answered.status == 401:
                    answered.headers["WWW-Authenticate"] = self.text(_CHALLENGES)
                if chance.random() < 0.5:
                    answered.body = mutate(b'{"errors":[{"code":"A","message":"b"}]}', chance)
            case 2:
                name, text = chance.choice(_HEADERS), self.text((*_TEXTS, *_LOCATIONS[:4], *_CHALLENGES[:4]))
                answered.headers[name] = "0" if name == "Retry-After" else text  # a wait of half a minute is allowed
            case 3:
                answered.body = mutate(answered.body, chance)
            case 4:
                answered.headers["Transfer-Encoding"] = "chunked"
                answered.headers.pop("Content-Length", None)
                size = chance.choice((len(answered.body), 0, 1, 1 << 40, len(answered.body) + 1))
                chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (size, answered.body)
                answered.body = mutate(chunked, chance) if chance.random() < 0.7 else chunked
            case _:
                answered.body = self.edited(answered.body)
                if chance.random() < 0.8:
                    answered.headers.pop("Docker-Content-Digest", None)
        return answered.encoded()

    def edited(self, body: bytes) -> bytes:
        """A document with other values in it. What is asked for by digest will not be it; a tag will."""
        try:
            document = json.loads(body)
        except ValueError:
            return mutate(body, self.chance)
        if isinstance(document, dict):
            edit_tree(document, self.chance)
        data = json.dumps(document).encode()
        if self.chance.random() < 0.2:  # half a character, in place of any text
            texts = [match.span(1) for match in re.finditer(rb': "([^"\\]*)"', data)]
            if texts:
                start, end = self.chance.choice(texts)
                data = data[:start] + b"\\ud800" + data[end:]
        if self.chance.random() < 0.9:  # then the edited one is there under its digest as well
            self.images.manifests[digest_of(data)] = data
        return data

    # Runs

    def one(self, number: int) -> None:
        chance = self.chance
        honest = dict(self.images.manifests)
        self.plan = {chance.choice((1, 1, 1, 2, 3, 4, 5, 6)): self.changed for _ in range(chance.choice((1, 1, 2, 3)))}
        self.asked, self.login = 0, number % 4 == 2
        location = f"oci://{self.server.host}/a:{chance.choice(('one', 'two'))}"
        trust = self.trust if chance.random() < 0.6 else None
        try:
            if number % 12 == 11:
                push(locations.parse(location), [self.artifact], ("linux/amd64",), PUSHY)
            elif number % 4 == 1:
                self.sync(location, trust)
            else:
                if self.login:
                    self.write_config()
                self.pull(location, trust)
            self.outcomes["taken"] += 1
        except CacheBuilderError as error:
            self.outcomes[type(error).__name__] += 1
            sentence = str(error).replace(self.server.host, "").splitlines()[0]
            assert sentence.isprintable() and len(str(error)) < 20_000, sentence
            self.refusals.add(re.sub(r"'.*'|\"[^\"]*\"|\S*\d\S*", "_", sentence)[-60:])
        finally:
            self.images.manifests = honest
            self.check()

    def pull(self, location: str, trust: Trust | None) -> None:
        located = fetch.look_up(location, self.machine, HASTY)
        path = located.get(into(self.got), trust)
        assert path.parent == self.got and path.read_bytes() == self.images.artifact

    def sync(self, location: str, trust: Trust | None) -> None:
        folder = SyncedFolder(self.synced, self.machine, trust)
        folder.sync(
            lambda: fetch.look_up(location, self.machine, HASTY), keep=2, allow_stale=self.chance.random() < 0.3
        )
        assert folder.current() is not None

    def write_config(self) -> None:
        host = self.server.host
        document: dict[str, Any] = {
            "auths": {host: {"auth": "Zmk6c3c="}, "r.example": {"username": "u", "password": "p"}},
            "credHelpers": {"h.example": "nothing"},
            "HttpHeaders": {"X": "y"},
        }
        if self.chance.random() < 0.5:
            document["auths"][host] = {"identitytoken": "t"}
        if self.chance.random() < 0.6:
            edit_tree(document, self.chance)
        data = json.dumps(document).encode()
        (self.folder / "config.json").write_bytes(mutate(data, self.chance) if self.chance.random() < 0.3 else data)
        for name in ("h.example", "r.example", "docker.io"):
            try:
                credentials.find(name)
            except CacheBuilderError as error:
                assert str(error).isprintable()

    def check(self) -> None:
        """Nothing is where it should not be; the next run begins anew, but for the folder of the syncs now and then."""
        if self.got.exists():
            for path in self.got.iterdir():
                assert path.is_file() and re.fullmatch(r"\.?[A-Za-z0-9][A-Za-z0-9._-]*", path.name), path
            with Folder.at(self.got) as got:
                got.clear()
        if self.synced.exists():
            assert {path.name for path in self.synced.iterdir()} <= {"current", "generations", ".fetched"}
            if self.chance.random() < 0.3:
                with Folder.at(self.synced) as synced:
                    synced.clear()


def only_helpers(event: str, arguments: tuple[Any, ...]) -> None:
    """End the process at a program that is no credential helper."""
    if event in ("os.exec", "os.posix_spawn", "os.system") or (
        event == "subprocess.Popen" and not re.fullmatch(r"docker-credential-[A-Za-z0-9._-]+", str(arguments[0]))
    ):
        sys.stderr.write(f"a program was run: {event} {arguments}\n")
        sys.stderr.flush()
        signal.raise_signal(signal.SIGKILL)


def main() -> None:
    artifact, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    machine = Machine(installations.find(Path(sys.argv[4]) if len(sys.argv) > 4 else None))
    started = time.monotonic()
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # flushing to a disk takes longer than the rest
    with tempfile.TemporaryDirectory(dir=in_memory) as temporary:
        folder = Path(temporary).resolve()
        for name in os.environ.keys() - {"PATH", "HOME"}:  # each request reads them all, for a proxy
            del os.environ[name]
        os.environ |= {"DOCKER_CONFIG": str(folder), "CACHEBUILDER_CACHE_DIR": str(folder / "cache")}
        fuzz = Fuzz(artifact, seed, machine, folder)
        guard(folder)
        sys.addaudithook(only_helpers)
        slowest = 0.0
        for number in range(count):
            signal.alarm(_SECONDS)
            begun = time.monotonic()
            fuzz.one(number)
            slowest = max(slowest, time.monotonic() - begun)
            signal.alarm(0)
    # The peak of this program alone: ``ru_maxrss`` would begin with that of the process that started it.
    status = Path("/proc/self/status").read_text()
    memory = int(status.partition("VmHWM:")[2].split()[0]) << 10
    assert memory < _MEMORY_BYTES, f"{memory} bytes"
    figures = {"mutations": count, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    figures |= {"slowest_seconds": round(slowest, 3), "memory_bytes": memory, "refusals": len(fuzz.refusals)}
    print(json.dumps(figures | dict(fuzz.outcomes)))


if __name__ == "__main__":
    main()
