"""What does DeepGEMM do with a damaged cache, and what do `doctor`, `verify` and `run` say about it?

    python benchmarks/gpu/faults.py OUT [--deep-gemm FOLDER]... [--device virtual|cuda] [--commit HASH]

For each copy of DeepGEMM, one artifact (faults.yaml) is built and restored. Each fault is then made in a copy of that folder.
A process serves from the copy with the variables of `cachebuilder env`, and `doctor`, `verify` and `run` look at it. Serving
calls every point of every op and, on a real GPU, compares the results with a reference. Writes one JSON object for each fault
to OUT/faults.jsonl. Full disks are small tmpfs mounts, which need root.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from cachebuilder.cuda.device import DeviceName
from cachebuilder.deepgemm import installation as installations
from cachebuilder.manifest import schema as manifests
from cachebuilder.virtual_gpu import library as virtual_gpu

HERE = Path(__file__).parent
MANIFEST = HERE / "faults.yaml"
ROOT = HERE.parents[1]
#: Seconds; serving whole takes a tenth of it, compiling the six kernels half.
HANGS_AFTER = 90


def serve(deep_gemm: str, device_name: DeviceName, forever: bool) -> None:
    """The serving process: says what it got through, and ends with what stopped it."""
    from cachebuilder.sweep.loading import load
    from cachebuilder.sweep.protocol import Job, Position

    manifest = manifests.load(MANIFEST)[0]
    job = Job(device=device_name, gpu=manifest.target.gpu, deep_gemm=deep_gemm, ops=tuple(manifest.ops))
    device = load(job, Position())
    print("serving", flush=True)
    while True:
        calls = right = wrong = 0
        for op in manifest.ops:
            points = op.points(device)
            call = op.prepare(device)
            for value in points:
                call(value)
                calls += 1
            if device_name == "cuda":
                device.torch.cuda.synchronize()
                for value in (points[0], points[len(points) // 2], points[-1]):
                    wrong_here = bool(op.trial(device, value, seed=value).problems())
                    right, wrong = right + (not wrong_here), wrong + wrong_here
        if not forever:
            print(json.dumps({"calls": calls, "right": right, "wrong": wrong}))
            return


class Faults:
    """One copy of DeepGEMM: its artifact, and a way to serve from a folder."""

    def __init__(self, deep_gemm: Path, device: str, work: Path) -> None:
        self.deep_gemm, self.device, self.work = deep_gemm, device, work
        self.generation = installations.find(deep_gemm).generation
        self.artifact = work / "faults.tar.zst"
        self.good = work / "good"
        self.cachebuilder("build", MANIFEST, "-o", self.artifact, check=True)
        self.cachebuilder("restore", self.artifact, "--to", self.good, check=True)

    def cachebuilder(
        self, *words: str | Path, check: bool = False, then: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cachebuilder", *map(str, words), "--deep-gemm", str(self.deep_gemm), *then]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if check and done.returncode:
            raise SystemExit(done.stderr)
        return done

    def serving(self, folder: Path, forever: bool = False, scratch: Path | None = None) -> subprocess.Popen[str]:
        """A process that serves from ``folder`` with the compiler that refuses, whatever `run` would say of it."""
        words = ["--scratch", str(scratch)] if scratch and self.generation == "deepjit" else []
        command = [sys.executable, "-m", "cachebuilder", "env", str(folder), "--format", "json", *words]
        told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        return self._start(self._server(forever), json.loads(told))

    def compiling(self, root: Path) -> subprocess.Popen[str]:
        """A process that serves from ``root`` as DeepGEMM alone would, with the real nvcc."""
        return self._start(self._server(False), {"DG_JIT_CACHE_DIR": str(root)})

    def _server(self, forever: bool) -> list[str]:
        return [sys.executable, __file__, "--serve", str(self.deep_gemm), self.device, *["forever"] * forever]

    def _start(self, command: list[str], extra: dict[str, str]) -> subprocess.Popen[str]:
        virtual = {}
        if self.device == "virtual":
            virtual = virtual_gpu.environment(manifests.load(MANIFEST)[0].target.gpu) | {
                "VIRTUAL_GPU_CHECK_CUBINS": "1"
            }
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"} | virtual | extra
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def look(self, folder: Path, served: subprocess.Popen[str] | None) -> dict[str, Any]:
        """How serving ended, and what the two verbs say of ``folder``."""
        doctor = json.loads(self.cachebuilder("doctor", folder, "--json").stdout)["folder"]
        verify = self.cachebuilder("verify", folder)
        run = self.cachebuilder("run", folder, then=("--", "true"))
        said = verify.stderr.strip().splitlines() if verify.returncode else verify.stdout.strip().splitlines()
        return {
            "serving": outcome(served) if served else None,
            "doctor": doctor["damaged"],
            "verify": {"exit": verify.returncode, "said": clean(said[-2:], folder)},
            "run": {"exit": run.returncode, "said": clean(run.stderr.strip().splitlines(), folder)},
        }


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The exit code, and what it got through or what stopped it; one that hangs is ended."""
    try:
        output, errors = process.communicate(timeout=HANGS_AFTER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"hung": f"no end after {HANGS_AFTER} s"}
    last = output.strip().splitlines()[-1:] or [""]
    if process.returncode == 0:
        return {"exit": 0} | json.loads(last[0])
    said = [line for line in errors.strip().splitlines() if line and not line.startswith((" ", "Traceback"))]
    return {"exit": process.returncode, "said": clean(said[:3], None)}


def clean(lines: list[str], folder: Path | None) -> list[str]:
    """Without this machine's folders."""
    text = "\n".join(lines).replace(str(folder), "DIR") if folder else "\n".join(lines)
    words = [
        f"…/{Path(word).name}" if word.startswith("/") and word.count("/") > 2 else word for word in text.split(" ")
    ]
    return " ".join(words)[:600].splitlines()


def damage(change: Callable[[Path], None]) -> Callable[[Faults, Path], dict[str, Any]]:
    """A fault that is done to one entry of the restored folder: a GEMM's, which every run asks for."""

    def run(faults: Faults, folder: Path) -> dict[str, Any]:
        shutil.copytree(faults.good, folder)
        entry = next(path for path in sorted((folder / "cache").iterdir()) if "fp8_gemm" in path.name)
        change(entry)
        return faults.look(folder, faults.serving(folder))

    return run


def truncate(entry: Path) -> None:
    cubin = entry / "kernel.cubin"
    os.truncate(cubin, cubin.stat().st_size // 2)


def empty(entry: Path) -> None:
    os.truncate(entry / "kernel.cubin", 0)


def remove(entry: Path) -> None:
    (entry / "kernel.cubin").unlink()


def flip(entry: Path) -> None:
    """One bit of the ELF header's magic: the smallest damage a loader can see."""
    data = bytearray((entry / "kernel.cubin").read_bytes())
    data[1] ^= 1
    (entry / "kernel.cubin").write_bytes(data)


def killed_serving(faults: Faults, folder: Path) -> dict[str, Any]:
    """SIGKILL in the middle of a launch sweep."""
    shutil.copytree(faults.good, folder)
    process = faults.serving(folder, forever=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return {"after_the_kill": process.returncode} | faults.look(folder, faults.serving(folder))


def killed_compiling(faults: Faults, folder: Path) -> dict[str, Any]:
    """SIGKILL while DeepGEMM compiles into a cache of its own; then the next process with that cache."""
    process = faults.compiling(folder)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 120
    while not list(folder.rglob("kernel.cu")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    left = sorted(path.name for path in folder.iterdir())
    cubins = len(list(folder.glob("cache/*/kernel.cubin")))
    return {"left": left, "whole_entries": cubins, "next": outcome(faults.compiling(folder))}


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[None]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(at)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


def full_serving(faults: Faults, folder: Path) -> dict[str, Any]:
    """The restored folder, and the writable root before it, are on a disk with nothing left."""
    with small_disk(folder):
        shutil.copytree(faults.good, folder / "root")
        fill(folder)
        return faults.look(folder / "root", faults.serving(folder / "root"))


def full_compiling(faults: Faults, folder: Path) -> dict[str, Any]:
    """DeepGEMM compiles into a cache on a full disk."""
    with small_disk(folder):
        (folder / "root").mkdir()
        fill(folder)
        served = outcome(faults.compiling(folder / "root"))
        entries = [path.name for path in (folder / "root").glob("cache/*")]
        return {"serving": served, "entries": len(entries)}


def full_restore(faults: Faults, folder: Path) -> dict[str, Any]:
    """`restore` onto a full disk."""
    with small_disk(folder):
        fill(folder)
        done = faults.cachebuilder("restore", faults.artifact, "--to", folder / "root")
        left = sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "filler")
        return {"exit": done.returncode, "said": clean(done.stderr.splitlines(), folder), "files_left": left}


FAULTS: dict[str, Callable[[Faults, Path], dict[str, Any]]] = {
    "none": lambda faults, folder: faults.look(faults.good, faults.serving(faults.good)),
    "killed while serving": killed_serving,
    "killed while DeepGEMM compiles": killed_compiling,
    "full disk, serving from the cache": full_serving,
    "full disk, DeepGEMM compiles": full_compiling,
    "full disk, restore": full_restore,
    "cubin cut in half": damage(truncate),
    "cubin empty": damage(empty),
    "cubin gone": damage(remove),
    "cubin's first bytes wrong": damage(flip),
}


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--deep-gemm", multiple=True, type=click.Path(path_type=Path))
@click.option("--device", type=click.Choice(["virtual", "cuda"]), default="virtual")
@click.option("--only", multiple=True, type=click.Choice(list(FAULTS)))
@click.option("--commit", default="")
def main(out: Path, deep_gemm: tuple[Path, ...], device: str, only: tuple[str, ...], commit: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    copies = deep_gemm or (installations.find().path,)
    with (out / "faults.jsonl").open("a") as log:
        for copy in copies:
            with tempfile.TemporaryDirectory() as work:
                faults = Faults(copy.absolute(), device, Path(work))
                for number, (name, fault) in enumerate(FAULTS.items()):
                    if only and name not in only:
                        continue
                    try:
                        found = fault(faults, Path(work, str(number)))
                    except subprocess.CalledProcessError as error:
                        found = {"not_run": error.stderr.decode().strip()}
                    line = {"commit": commit, "fault": name, "generation": faults.generation, "device": device} | found
                    print(json.dumps(line), flush=True)
                    log.write(json.dumps(line) + "\n")
                    log.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], "forever" in sys.argv[4:])
    else:
        main()
