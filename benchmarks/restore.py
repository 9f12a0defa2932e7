"""The restore's figures, whole processes, on this machine: 1,000 kernels against ``tar --zstd -x`` of the same file.

    python benchmarks/restore.py ARTIFACT [KERNELS]

ARTIFACT is a real one, of either generation, for the DeepGEMM installed here (or ``--deep-gemm PATH`` as a third
argument). Its kernels are repeated with other names, sources that differ in a comment and cubins that differ in noise.
Prints one JSON object a figure; medians of nine alternating runs. Ratios hold in one run on one machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cachebuilder.artifact.pack import Packed, pack
from cachebuilder.artifact.read import open_archive
from cachebuilder.deepgemm import entries
from cachebuilder.gpus import find
from cachebuilder.plan import Kernel, Plan

RUNS = 9


def say(what: str, **figures: object) -> None:
    print(json.dumps({"what": what} | figures), flush=True)


def grow(artifact: Path, count: int, output: Path) -> Packed:
    """An artifact of ``count`` kernels out of a real one."""
    with open_archive(artifact) as archive:
        contents: dict[str, dict[str, bytes]] = {}
        for entry, file, data in archive.files():
            contents.setdefault(entry.name, {})[file.name] = data
        index, manifest = archive.index, archive.manifest
    fingerprint = index.fingerprint
    noise = random.Random(1)
    kernels: list[Kernel] = []
    cubins: dict[str, bytes] = {}
    for number in range(count):
        old = index.entries[number % len(index.entries)]
        files = contents[old.name]
        name = entries.kernel_name(fingerprint.generation, old.name) or ""
        source = files[entries.SOURCE].decode() + f"// {number}\n"
        if fingerprint.generation == "legacy":
            release = fingerprint.compiler.split("release ")[1].split(",")[0]
            entry = entries.legacy_entry(name, release, fingerprint.legacy_flags or "", source.encode())
        else:
            entry = f"{name}.{hashlib.sha256(source.encode()).hexdigest()[:32]}"
        cubin = bytearray(files[entries.CUBIN])
        for _ in range(len(cubin) // 64):  # about as different as one tile shape's code from another's
            cubin[noise.randrange(64, len(cubin))] = noise.randrange(256)
        cubins[entry] = bytes(cubin)
        meta = files[entries.METADATA].decode() if entries.METADATA in files else None
        kernels.append(
            Kernel(entry=entry, name=name, source=source, flags=(), metadata=meta, selected_by=old.selected_by)
        )
    plan = Plan(
        generation=fingerprint.generation,
        gpu=find(index.recorded["gpu"]),
        sm_counts=fingerprint.sm_counts,
        arch=fingerprint.arch,
        include=fingerprint.install_include,
        legacy_flags=fingerprint.legacy_flags,
        ops=index.ops,
        kernels=tuple(kernels),
        calls=0,
        torch=index.recorded["torch"],
        python=index.recorded["python"],
        peak_bytes=0,
    )
    return pack(output, index.name, manifest, plan, cubins, fingerprint)


def timed(command: Sequence[str | Path]) -> float:
    started = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return time.perf_counter() - started


def alternate(folder: Path, **ways: Callable[[Path], Sequence[str | Path]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, command in ways.items():
            target = folder / "target"
            shutil.rmtree(target, ignore_errors=True)
            if name == "tar":
                target.mkdir()
            found[name].append(timed(command(target)))
    return found


def main() -> None:
    artifact, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    here = ["--deep-gemm", sys.argv[3]] if len(sys.argv) > 3 else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packed = grow(artifact, count, folder / "grown.tar.zst")
        say("artifact", kernels=count, bytes=packed.size, unpacked_bytes=packed.unpacked_size)
        command = [sys.executable, "-m", "cachebuilder"]
        found = alternate(
            folder,
            tar=lambda to: ["tar", "--zstd", "-xf", packed.path, "-C", to],
            restore=lambda to: [*command, "restore", packed.path, "--to", to, *here],
        )
        tar, restore = (statistics.median(found[name]) for name in ("tar", "restore"))
        say("restore", seconds=round(restore, 3), tar_seconds=round(tar, 3), ratio=round(restore / tar, 2))
        target = folder / "target"
        again = statistics.median(timed([*command, "restore", packed.path, "--to", target, *here]) for _ in range(RUNS))
        say("restore again, all there", seconds=round(again, 3))
        nvcc, text = target / "cachebuilder/bin/nvcc", target / "cachebuilder/bin/version.txt"
        loop = 'i=0; while [ $i -lt 200 ]; do "$@" >/dev/null; i=$((i + 1)); done'
        frozen, cat = (
            statistics.median(timed(["sh", "-c", loop, "sh", *what]) / 200 for _ in range(5))
            for what in ([nvcc, "--version"], ["cat", text])
        )
        say("frozen nvcc --version", milliseconds=round(frozen * 1000, 2), cat_milliseconds=round(cat * 1000, 2))


if __name__ == "__main__":
    main()
