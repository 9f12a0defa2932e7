"""Fuzz the texts that come with an artifact: a value must mean the same everywhere, or be refused; nothing else happens.

    python tests/fuzz_texts.py environment|manifest [MUTATIONS] [SEED]

- ``environment``: a mutated map of variables goes through a manifest and through an index, which must agree on it. What
  they take goes, with a mutated folder, through every format of ``cachebuilder env``. A real shell, a YAML parser with
  Kubernetes' expansion, and BuildKit's two tokenizers read it, and must find the variables and values that were meant.
- ``manifest``: a mutated manifest is read; if it is taken, a source is added to it, and it is read again.

Only a `CacheBuilderError` may be raised. An audit hook ends the run at a file that is written outside the folder and at
a process other than the fuzzer's shell, which has an empty PATH; an alarm ends it at a mutation that takes 10 seconds, a
limit at 1 GB of memory. Prints one JSON object.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cachebuilder.artifact.index import Fingerprint, Index
from cachebuilder.artifact.read import parse_index
from cachebuilder.authoring import sources
from cachebuilder.authoring.sources import NewSource
from cachebuilder.cli import env
from cachebuilder.errors import CacheBuilderError
from cachebuilder.manifest import schema
from cachebuilder.restoring import place
from cachebuilder.restoring.environment import ENGINES, variables
from tests.fuzz_archives import guard, mutate

ROOT = Path(__file__).parents[1]
_MEMORY_BYTES = 1 << 30
#: Evaluations by one shell: starting it takes longer than many of them.
_BATCH = 100

_PIECES = (
    "DG_", "DJ_", "JIT_", "A", "1", "x", "=", ";", " ", "\n", "\r", "\t", "\0", "'", '"', "`", "$", "$$", "${HOME}", "$(HOME)",
    "$(touch PWN)", "; touch PWN; ", "&& touch PWN", "\\", "\\\n", "\\n", "#", " #", ": ", "- ", "{", "}", "[", "]", "%", "*",
    "&", "!", "|", ">", "<<", "~", "@", ",", "é", "😀", "\x1b[2J", "\x85", "\x9b", "\u2028", "\u202e", "\u00a0", "\udcff",
    "null", "true", "1e3", "LD_PRELOAD", "PATH", "CACHEBUILDER_REAL_NVCC", "JIT_CACHE_DIR", "JIT_NVCC_COMPILER", "RUN touch PWN",
)  # fmt: skip
_HONEST = {"DG_MEGA_MOE_TILES": "1,2,3,4,5", "DG_JIT_DEBUG": "1", "DJ_JIT_WITH_LINEINFO": "1", "DG_A": "a b"}
_YAML_PIECES = (
    b"&a ", b"*a", b"*a, *a, *a", b"<<: ", b"!!str ", b"!!python/object:os.system ", b"[", b"]", b"{", b"}", b"[" * 100, b"- " * 50,
    b"? ", b": ", b"\n", b"\r", b"\xc2\x85", b"\xe2\x80\xa8", b"\n  ", b"\t", b"|\n", b">\n", b"|9\n", b"'", b'"', b"# ", b"---\n",
    b"...\n", b"%YAML 1.1\n", b"\0", b"\xff", b"\\ud800", b"1e999", b".inf", b".nan", b"0x10", b"0o7", b"9" * 5000, b"2001-01-01",
    b"null", b"~", b"true", b"environment: {DG_A: '1'}\n", b"sources: [{source: x}]\n", b"-1", b"1_000", b"__import__", b"op: ",
)  # fmt: skip


def in_a_dockerfile(text: str) -> dict[str, str]:
    """What BuildKit's dockerfile frontend makes of lines of comments and ENV: each variable's value.

    Follows ``frontend/dockerfile/parser/line_parsers.go`` (parseWords) and ``frontend/dockerfile/shell/lex.go``.
    """
    values: dict[str, str] = {}
    for line in text.split("\n"):
        assert not re.search(r"([^\\])\\[ \t]*$|^\\[ \t]*$", line), f"continued: {line!r}"
        if line.lstrip().startswith("#"):
            continue
        instruction, _, rest = line.partition(" ")
        assert instruction == "ENV", line
        for word in _dockerfile_words(rest):
            name, equals, value = word.partition("=")
            assert equals, word
            values[name] = _dockerfile_value(value)
    return values


def _dockerfile_words(rest: str) -> list[str]:
    words, word, quote, blank, position = [], "", "", False, 0
    while position < len(rest):
        character = rest[position]
        if not quote and character.isspace():
            words += [word] if word or blank else []
            word, blank = "", False
        else:
            if quote:
                quote = "" if character == quote else quote
            elif character in "'\"":
                quote, blank = character, True
            if character == "\\":  # it keeps the next character from ending anything, inside quotes of both kinds
                position += 1
                word += character
                character = rest[position : position + 1]
            word += character
        position += 1
    return words + ([word] if word or blank else [])


def _dockerfile_value(word: str) -> str:
    value, quote, position = "", "", 0
    while position < len(word):
        character = word[position]
        following = word[position + 1 : position + 2]
        assert character != "$" or quote == "'", f"expanded: {word!r}"
        if character == quote:
            quote = ""
        elif not quote and character in "'\"":
            quote = character
        elif character == "\\" and quote != "'" and (not quote or following in ('"', "$", "\\")):
            value += following
            position += 1
        else:
            value += character
        position += 1
    assert not quote, word
    return value


def in_kubernetes(value: str, environment: Mapping[str, str]) -> str:
    """What Kubernetes makes of the value of a container's variable (``third_party/forked/golang/expansion``)."""

    def expand(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", expand, value)


def _mutated(text: str, chance: random.Random) -> str:
    for _ in range(chance.choice((0, 0, 1, 1, 2, 4))):
        at = chance.randrange(len(text) + 1)
        piece = chance.choice((chance.choice(_PIECES), chr(chance.randrange(1, 0x250)), text[at:] * 2))
        text = text[:at] + piece + text[at + chance.choice((0, 0, 1, 3)) :]
    return text if chance.random() < 0.97 else text * 400


class Environments:
    """Mutations of maps of variables."""

    def __init__(self, chance: random.Random, folder: Path, outcomes: collections.Counter[str]) -> None:
        self._chance, self._outcomes, self._folder = chance, outcomes, folder
        text = (ROOT / "tests" / "data" / "one-layer.yaml").read_bytes()
        self._manifest = schema.reader.read(text).value
        from tests.archives import unpack

        self._index = json.loads(unpack(ROOT / "tests" / "data" / "v1-deepjit.tar.zst")[0].data)
        self._scripts: list[tuple[str, dict[str, str]]] = []

    def one(self) -> None:
        """One mutation."""
        chance = self._chance
        names = chance.sample(sorted(_HONEST), chance.randrange(1, 4))
        # Half of the names stay honest, so that values reach the formats.
        edit = chance.random() < 0.5
        environment = {_mutated(name, chance) if edit else name: _mutated(_HONEST[name], chance) for name in names}
        taken = self._taken(environment)
        self._outcomes["taken" if taken else "refused"] += 1
        if not taken:
            return
        index = taken
        root = Path("/") / (_mutated("dir", chance).replace("\0", "").strip("/") or "x")
        scratch = Path("/") / _mutated("scratch", chance).replace("\0", "") if chance.random() < 0.5 else None
        try:
            serving = variables(place.usual(root, [index], scratch), [index], chance.choice(ENGINES), {})
            texts = {form: env.text(serving, form) for form in ("shell", "docker", "k8s", "json")}
        except CacheBuilderError:
            self._outcomes["unquotable"] += 1
            return
        wanted = {variable.name: variable.value for variable in serving}
        assert wanted.items() >= environment.items()
        assert in_a_dockerfile(texts["docker"]) == wanted
        items = yaml.load(texts["k8s"], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        assert {item["name"]: in_kubernetes(item["value"], {"HOME": "/h"}) for item in items} == wanted, texts["k8s"]
        assert json.loads(texts["json"]) == wanted
        self._scripts.append((texts["shell"], wanted))
        self._outcomes["quoted"] += 1
        if len(self._scripts) == _BATCH:
            self.finish()

    def _taken(self, environment: dict[str, str]) -> Index | None:
        """The index with this environment, if a manifest and an index may have it; they must agree."""
        try:
            model = schema.parse(json.dumps(self._manifest | {"environment": environment}).encode())
        except CacheBuilderError:
            model = None
        fingerprint = self._index["fingerprint"] | {"environment": environment}
        fields = {**dict.fromkeys(Fingerprint.model_fields), **fingerprint}
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        data = json.dumps(self._index | {"fingerprint": fingerprint, "fingerprint_digest": digest}).encode()
        try:
            index = parse_index(data, Path("x"))
        except CacheBuilderError:
            index = None
        assert (model is None) == (index is None), environment
        assert model is None or model.environment == environment
        return index

    def finish(self) -> None:
        """Let a shell evaluate what has gathered."""
        lines = []
        for text, wanted in self._scripts:
            lines.append(f"(\n{text}\nprintf '%s\\0' " + " ".join(f'"${name}"' for name in wanted) + "\n)")
        done = subprocess.run(
            ["/bin/sh"],
            input="\n".join(lines).encode(),
            cwd=self._folder,
            env={"PATH": ""},
            capture_output=True,
            check=True,
        )
        meant = [value for _, wanted in self._scripts for value in wanted.values()]
        assert done.stderr == b"", done.stderr[:500]
        assert done.stdout.decode().split("\0")[:-1] == meant
        self._scripts.clear()


class Manifests:
    """Mutations of manifests."""

    def __init__(self, chance: random.Random, folder: Path, outcomes: collections.Counter[str]) -> None:
        self._chance, self._outcomes, self._path = chance, outcomes, folder / "in.yaml"
        self._texts = [(ROOT / "tests" / "data" / "one-layer.yaml").read_bytes(), _WITH_SOURCES.encode()]
        self._source = NewSource("static int added;\n", "added", "added")

    def one(self) -> None:
        """One mutation."""
        chance = self._chance
        text = chance.choice(self._texts)
        for _ in range(chance.choice((1, 1, 2, 4))):
            if chance.random() < 0.4:
                text = mutate(text, chance)
            else:
                at = chance.randrange(len(text) + 1)
                text = text[:at] + chance.choice(_YAML_PIECES) * chance.choice((1, 1, 1, 3, 200)) + text[at:]
        try:
            schema.parse(text, "m")
        except CacheBuilderError:
            self._outcomes["refused"] += 1
            return
        self._outcomes["taken"] += 1
        self._path.write_bytes(text)
        try:
            sources.add(self._path, [self._source])
        except CacheBuilderError:
            self._outcomes["not added"] += 1
            assert self._path.read_bytes() == text
        else:
            assert self._source.text in [source.source for source in schema.load(self._path)[0].sources]

    def finish(self) -> None:
        """Nothing is left over."""


_WITH_SOURCES = """\
# a comment
name: fuzz
target: {gpu: H200, sm_counts: [132, 64]}
max_tokens: 8
toolchain: {nvcc: "13.0"}
environment: {DG_A: "1", DG_B: 'x y'}
ops:
  - {op: fp8_gemm_nt, n: 576, k: 512}
  # another
  - op: bf16_gemm_nt
    n: 64
    k: 64
    max_tokens: 3
sources:
  - kernel: one
    source: |
      #include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>
      static void f() { auto p = &sm90_fp8_gemm_1d2d_impl<1, 2>; }
  - source: "one line\\n"
"""
KINDS = {"environment": Environments, "manifest": Manifests}


def refuse_processes() -> None:
    """End the process where it starts another program than the fuzzer's shell."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        started = event == "subprocess.Popen" and list(arguments[1]) != ["/bin/sh"]
        if started or event in ("os.system", "os.exec", "os.posix_spawn"):
            sys.stderr.write(f"a process: {event} {arguments}\n")
            os._exit(3)

    sys.addaudithook(hook)


def main() -> None:
    """The program."""
    kind, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    outcomes: collections.Counter[str] = collections.Counter()
    started, slowest = time.monotonic(), 0.0
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, "utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        fuzz = KINDS[kind](random.Random(seed), folder, outcomes)
        guard(folder)
        refuse_processes()
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        for number in range(count):
            signal.alarm(10)
            begun = time.process_time()
            try:
                fuzz.one()
            except BaseException:
                sys.stderr.write(f"mutation {number} of seed {seed}\n")
                raise
            slowest = max(slowest, time.process_time() - begun)
        signal.alarm(30)
        fuzz.finish()
        signal.alarm(0)
        assert {path.name for path in folder.iterdir()} <= {"in.yaml"}
    figures: dict[str, object] = {"kind": kind, "mutations": count, "seed": seed}
    figures |= {"seconds": round(time.monotonic() - started, 1), "slowest_cpu_seconds": round(slowest, 3)}
    print(json.dumps(figures | dict(outcomes)))


if __name__ == "__main__":
    main()
