"""Measure restores on this machine, as whole processes: 1,000 kernels, compared with ``tar --zstd -x`` of the same file.

    python benchmarks/restore.py ARTIFACT [KERNELS [DEEP_GEMM]] > benchmarks/results/restore-….json

ARTIFACT is a real one, of either generation, for the DeepGEMM installed here or for the copy in DEEP_GEMM. Its kernels
are repeated with other names, sources that differ in a comment and cubins that differ in noise. The figures are medians of
eleven alternating runs: wall and processor seconds of all processes. Both depend on the file system of TMPDIR, which the
result names. `smallest.py` shows the least time that a Python program needs. cachebuilder's modules are compiled to bytecode
first, as pip does. Ratios are comparable within one run on one machine only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cachebuilder.artifact.pack import Packed, pack_as
from cachebuilder.artifact.read import open_archive
from cachebuilder.cuda.gpus import find
from cachebuilder.deepgemm import entries
from cachebuilder.planning.plan import Kernel, Plan

RUNS = 11
Times = tuple[float, float]


def grow(artifact: Path, count: int, output: Path) -> Packed:
    """Make an artifact of ``count`` kernels from a real one."""
    with open_archive(artifact) as archive:
        contents: dict[str, dict[str, bytes]] = {}
        for member, data in archive.files():
            contents.setdefault(member.entry.name, {})[member.file.name] = data
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
        for _ in range(len(cubin) // 64):  # they differ about as much as the code of two tile shapes
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
    return pack_as(index.name, manifest, plan, cubins, fingerprint).write(output)


def timed(command: Sequence[str | Path]) -> Times:
    """Wall and processor seconds of a command and of all processes that it started."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    wall, after = time.perf_counter() - started, os.times()
    own = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, own


def medians(found: Sequence[Times]) -> dict[str, float]:
    wall, processor = (statistics.median(times) for times in zip(*found, strict=True))
    return {"seconds": round(wall, 3), "cpu_seconds": round(processor, 3)}


def alternate(folder: Path, **ways: Callable[[Path], Sequence[str | Path]]) -> dict[str, list[Times]]:
    found: dict[str, list[Times]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, command in ways.items():
            target = folder / "target"
            shutil.rmtree(target, ignore_errors=True)
            if name == "tar":
                target.mkdir()
            found[name].append(timed(command(target)))
    return found


def file_system(folder: Path) -> str:
    command = ["stat", "--file-system", "--format", "%T", folder]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    artifact, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    here = ["--deep-gemm", sys.argv[3]] if len(sys.argv) > 3 else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
        packed = grow(artifact, count, folder / "grown.tar.zst")
        command = [sys.executable, "-m", "cachebuilder"]

        def restore(to: Path) -> list[str | Path]:
            return [*command, "restore", packed.path, "--to", to, *here]

        timed(restore(folder / "first"))
        found = alternate(
            folder,
            smallest=lambda to: [sys.executable, Path(__file__).with_name("smallest.py"), packed.path, to],
            tar=lambda to: ["tar", "--zstd", "-xf", packed.path, "-C", to],
            restore=restore,
        )
        target = folder / "target"
        again = [timed(restore(target)) for _ in range(RUNS)]
        nvcc, text = target / "cachebuilder/bin/nvcc", target / "cachebuilder/bin/version.txt"
        loop = 'i=0; while [ $i -lt 200 ]; do "$@" >/dev/null; i=$((i + 1)); done'
        frozen, cat = (
            statistics.median(timed(["sh", "-c", loop, "sh", *what])[0] / 200 for _ in range(5))
            for what in ([nvcc, "--version"], ["cat", text])
        )
        tar, restored = medians(found["tar"]), medians(found["restore"])
        with open_archive(packed.path) as archive:
            include = archive.index.fingerprint.install_include
        figures = {
            "kernels": count,
            "bytes": packed.size,
            "unpacked_bytes": packed.unpacked_size,
            "relocated": bool(here) and include is not None and include != f"{here[1]}/include",
            "file_system": file_system(folder),
            "machine": {
                "cpus": os.cpu_count(),
                "system": f"{platform.system()} {platform.machine()}",
                "load": round(os.getloadavg()[0], 1),
            },
            "restore": restored,
            "tar": tar,
            "smallest": medians(found["smallest"]),
            "restore_to_tar": {name: round(restored[name] / tar[name], 2) for name in tar},
            "restore_again": medians(again),
            "frozen_nvcc_version_ms": round(frozen * 1000, 2),
            "cat_ms": round(cat * 1000, 2),
        }
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
