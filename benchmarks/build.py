"""Measure the build on this machine, in whole processes: planning, compiling, packing, rebuilding, being killed.

    python benchmarks/build.py plan                  # each DeepSeek-V3 manifest: kernels, calls, wall, CPU, memory
    python benchmarks/build.py build [MANIFEST]      # two builds in two folders, a rebuild, packing against zstd -19
    python benchmarks/build.py kill [MANIFEST]       # ten SIGKILLs at random moments (seed 0), a build after each

Prints one JSON object for each figure. Compare times only within one run on one machine.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import zstandard

from cachebuilder import building
from cachebuilder.deepgemm import installation
from cachebuilder.manifest.inputs import load_manifest

MANIFESTS = Path(__file__).parents[1] / "manifests"


def say(what: str, **figures: object) -> None:
    print(json.dumps({"what": what} | figures), flush=True)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cachebuilder", *map(str, arguments)]


def cpu_of_children() -> float:
    """The CPU seconds of all child processes that have ended; other load on the machine does not change them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def plan() -> None:
    for manifest in sorted(MANIFESTS.glob("deepseek-v3*.yaml")):
        walls, cpus = [], []
        for _ in range(3):
            started, before = time.monotonic(), cpu_of_children()
            process = subprocess.run(
                command("plan", manifest, "--no-store", "--json"), capture_output=True, text=True, check=True
            )
            walls.append(time.monotonic() - started)
            cpus.append(cpu_of_children() - before)
        printed = json.loads(process.stdout)
        say(
            "plan",
            manifest=manifest.stem,
            kernels=len(printed["kernels"]),
            calls=printed["calls"],
            deep_gemm=installation.find().version,
            cores=len(os.sched_getaffinity(0)),
            wall_seconds=sorted(round(wall, 2) for wall in walls),
            cpu_seconds=sorted(round(cpu, 2) for cpu in cpus),
            peak_bytes=printed["peak_bytes"],
        )


def build(manifest: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            os.environ["CACHEBUILDER_CACHE_DIR"] = f"{folder}/{name}/cache"
            built = building.build(load_manifest(manifest), Path(folder, name, "out.tar.zst"))
            report = built.compiled
            say(
                "build",
                folder=name,
                kernels=len(built.plan.kernels),
                plan_seconds=round(built.plan_seconds, 1),
                compile_seconds=round(report.wall_seconds, 1),
                nvcc_cpu_seconds=round(report.cpu_seconds, 1),
                wall_over_cpu_by_cores=round(report.wall_seconds * cores / report.cpu_seconds, 3),
                pack_seconds=round(built.pack_seconds, 2),
                sha256=built.packed.sha256,
            )
            digests.append(built.packed.sha256)
        say("two folders", equal=len(set(digests)) == 1)
        started = time.monotonic()
        subprocess.run(command("build", manifest, "-o", f"{folder}/three.tar.zst"), check=True, capture_output=True)
        say("rebuild, whole process", wall_seconds=round(time.monotonic() - started, 2))
        tar = Path(folder, "out.tar")
        tar.write_bytes(zstandard.ZstdDecompressor().decompress(built.packed.path.read_bytes()))
        subprocess.run(["zstd", "-19", "-q", tar], check=True)
        reference = tar.with_name("out.tar.zst").stat().st_size
        say("size", artifact=built.packed.size, zstd_19=reference, ratio=round(built.packed.size / reference, 4))


def kill(manifest: Path) -> None:
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"CACHEBUILDER_CACHE_DIR": f"{folder}/cache"}
        line = command("build", manifest, "-o", f"{folder}/out.tar.zst")

        def run(limit: float | None) -> bool:
            process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                return process.wait(limit) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return False

        started = time.monotonic()
        assert run(None)
        whole_seconds = time.monotonic() - started
        expected = Path(folder, "out.tar.zst").read_bytes()
        for _ in range(10):
            shutil.rmtree(f"{folder}/cache")
            os.unlink(f"{folder}/out.tar.zst")
            moment = moments.uniform(0, whole_seconds)
            finished = run(moment)
            left = sorted(path.name for path in Path(folder).iterdir())
            then_built = run(None)
            equal = Path(folder, "out.tar.zst").read_bytes() == expected
            say(
                "killed",
                after_seconds=round(moment, 1),
                finished=finished,
                left=left,
                then_built=then_built,
                equal=equal,
            )


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["plan"]
    if verb == "plan":
        plan()
    elif verb == "build":
        build(Path(rest[0]) if rest else MANIFESTS / "deepseek-v3-tp8-h200.yaml")
    elif verb == "kill":
        kill(Path(rest[0]) if rest else MANIFESTS / "quickstart.yaml")
    else:
        sys.exit(__doc__)
