"""Push and pull compared with skopeo: whole processes, one registry on loopback, the same blob; then 100 pulls at once.

    python benchmarks/ship.py ARTIFACT [MEGABYTES [RESULT.json]]

ARTIFACT is a real one. Throughput is measured with an artifact of MEGABYTES (default 512): the real one's kernels repeated,
with cubins of noise, which zstd cannot make smaller. Each pair of runs is one of each tool at the same registry; the tools
take turns to go first, and the ratio is the median over the pairs. Needs docker-registry and skopeo (Debian's packages).
Prints one JSON object a figure, and writes all of them to RESULT.json.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cachebuilder.artifact import pack
from cachebuilder.artifact.read import open_archive
from cachebuilder.cuda.gpus import find
from cachebuilder.deepgemm import entries
from cachebuilder.planning.plan import Kernel, Plan
from tests.registries import Registry, registry

PAIRS = 7
AT_ONCE = 100
CUBIN_BYTES = 1 << 20
TOOL = [sys.executable, "-m", "cachebuilder"]

Command = Sequence[str | Path]


def enlarge(artifact: Path, megabytes: int, output: Path) -> None:
    """Make an artifact of about this size from a real one: its kernels repeated, with noise for cubins."""
    with open_archive(artifact) as opened:
        contents: dict[str, dict[str, bytes]] = {}
        for member, data in opened.files():
            contents.setdefault(member.entry.name, {})[member.file.name] = data
        index, manifest = opened.index, opened.manifest
    noise, fingerprint = random.Random(1), index.fingerprint
    kernels, cubins = [], {}
    for number in range(megabytes):
        old = index.entries[number % len(index.entries)]
        name = entries.kernel_name(fingerprint.generation, old.name) or ""
        entry = f"{name}.{hashlib.sha256(str(number).encode()).hexdigest()[:32]}"
        files = contents[old.name]
        cubins[entry] = noise.randbytes(CUBIN_BYTES)
        meta = files[entries.METADATA].decode() if entries.METADATA in files else None
        source = files[entries.SOURCE].decode()
        kernels.append(
            Kernel(entry=entry, name=name, source=source, flags=(), metadata=meta, selected_by=old.selected_by)
        )
    plan = Plan(
        generation=fingerprint.generation, gpu=find(index.recorded["gpu"]), sm_counts=fingerprint.sm_counts,
        arch=fingerprint.arch, include=fingerprint.install_include, legacy_flags=fingerprint.legacy_flags,
        ops=index.ops, kernels=tuple(kernels), calls=0, torch=index.recorded["torch"],
        python=index.recorded["python"], peak_bytes=0,
    )  # fmt: skip
    pack._LEVEL = 1
    pack.pack_as(index.name, manifest, plan, cubins, fingerprint).write(output)


def timed(command: Command) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: {error.decode()}")
    return wall, usage.ru_utime + usage.ru_stime


def compare(ours: Callable[[int], Command], skopeos: Callable[[int], Command], size: int) -> dict[str, object]:
    """Pairs of runs, each into a fresh destination."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "skopeo": []}
    for number in range(PAIRS + 1):
        pair = [("ours", ours), ("skopeo", skopeos)]
        for name, command in pair if number % 2 else reversed(pair):
            found[name].append(timed(command(number)))
    for runs in found.values():
        runs.pop(0)  # the first pair warmed the disk's cache
    ratios = [a[0] / b[0] for a, b in zip(found["ours"], found["skopeo"], strict=True)]
    result: dict[str, object] = {"ratio": round(statistics.median(ratios), 2), "ratios": [round(r, 2) for r in ratios]}
    for name, runs in found.items():
        wall, cpu = (statistics.median(run[part] for run in runs) for part in (0, 1))
        result[name] = {
            "seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "megabytes_a_second": round(size / wall / 1e6),
        }
    return result


def at_once(command: Callable[[int], Command], count: int) -> float:
    """Wall seconds from the start of this many processes at once until the last has succeeded."""
    started = time.perf_counter()
    running = [
        subprocess.Popen([str(part) for part in command(n)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for n in range(count)
    ]
    for process in running:
        _, error = process.communicate()
        if process.returncode:
            raise SystemExit(error.decode())
    return time.perf_counter() - started


def main() -> None:
    artifact, megabytes = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 512
    results: list[dict[str, object]] = []

    def say(what: str, **figures: object) -> None:
        results.append({"what": what} | figures)
        print(json.dumps(results[-1]), flush=True)

    with tempfile.TemporaryDirectory() as temporary, registry(Path(temporary) / "registry") as found:
        folder = Path(temporary)
        version = subprocess.run(["skopeo", "--version"], capture_output=True, text=True, check=True).stdout.strip()
        say("machine", cores=os.cpu_count(), skopeo=version)
        throughput(artifact, megabytes, folder, found, say)
        crowd(artifact, folder, found, say)
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(json.dumps(results, indent=1) + "\n")


def throughput(artifact: Path, megabytes: int, folder: Path, found: Registry, say: Callable[..., None]) -> None:
    large = folder / "large.tar.zst"
    enlarge(artifact, megabytes, large)
    size = large.stat().st_size
    timed([*TOOL, "push", f"oci://{found.host}/large:v1", large])
    source = f"docker://{found.host}/large:v1"
    timed(["skopeo", "copy", "--src-tls-verify=false", source, f"oci:{folder}/layout:v1"])
    targets = itertools.count()

    def fresh() -> Path:
        shutil.rmtree(folder / "got", ignore_errors=True)
        (folder / "got").mkdir()
        return folder / "got" / f"{next(targets)}"

    pulls = compare(
        lambda _: [*TOOL, "pull", f"oci://{found.host}/large:v1", "-o", fresh()],
        lambda _: ["skopeo", "copy", "--src-tls-verify=false", source, f"dir:{fresh()}"],
        size,
    )
    say("pull", bytes=size, **pulls)
    place = folder / "pushed"

    def emptied() -> str:
        """An empty registry: skopeo remembers which repositories have a blob, and would only link it."""
        nonlocal second
        second.stop()
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        second = Registry(place)
        second.start()
        return second.host

    place.mkdir()
    second = Registry(place)
    second.start()
    try:
        pushes = compare(
            lambda _: [*TOOL, "push", f"oci://{emptied()}/large:v1", large],
            lambda _: ["skopeo", "copy", "--dest-tls-verify=false", f"oci:{folder}/layout:v1", f"docker://{emptied()}/large:v1"],
            size,
        )  # fmt: skip
    finally:
        second.stop()
    say("push", bytes=size, **pushes)


def crowd(artifact: Path, folder: Path, found: Registry, say: Callable[..., None]) -> None:
    timed([*TOOL, "push", f"oci://{found.host}/crowd:v1", artifact])
    digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    rounds: dict[str, list[float]] = {"ours": [], "skopeo": []}
    for number in range(4):
        got = folder / f"crowd-{number}"
        got.mkdir()
        ours = at_once(lambda n, got=got: [*TOOL, "pull", f"oci://{found.host}/crowd:v1", "-o", got / f"{n}"], AT_ONCE)
        whole = sum(hashlib.sha256((got / f"{n}").read_bytes()).hexdigest() == digest for n in range(AT_ONCE))
        if whole != AT_ONCE or len(list(got.iterdir())) != AT_ONCE:
            raise SystemExit(f"{whole} of {AT_ONCE} pulls are whole, {len(list(got.iterdir()))} files")
        source = f"docker://{found.host}/crowd:v1"
        skopeos = at_once(
            lambda n, got=got, source=source: ["skopeo", "copy", "--src-tls-verify=false", source, f"dir:{got}/s{n}"], AT_ONCE
        )  # fmt: skip
        rounds["ours"].append(ours)
        rounds["skopeo"].append(skopeos)
    say(
        f"{AT_ONCE} pulls at once",
        bytes=artifact.stat().st_size,
        whole=AT_ONCE,
        seconds=round(statistics.median(rounds["ours"]), 2),
        skopeo_seconds=round(statistics.median(rounds["skopeo"]), 2),
    )
    starts = [timed([*TOOL, "--version"])[1] for _ in range(5)]
    say("cachebuilder --version", cpu_seconds=round(statistics.median(starts), 3))


if __name__ == "__main__":
    main()
