"""Kill parts of a fleet's build at random moments: workers, nodes and the driver of a Ray cluster; or shards on one S3 server.

    python benchmarks/fleet_kills.py ray LEGACY_DEEP_GEMM [--kills 20] [--seed 1]
    python benchmarks/fleet_kills.py shards LEGACY_DEEP_GEMM [--seed 1]

The fleet is real: six cells (two pairs are equal) of two linear layers and an expert layer, on H100, H200 and H20, with the
installed DeepGEMM and the legacy one; each kernel is compiled by nvcc. If a build ends before all kills were made, the next one
begins with an empty store. Each build's artifacts are compared with those of `cachebuilder build` for each cell alone. Each
process logs what it asks of the store and what it puts there: a kernel is compiled twice only if the store did not have it
when the second job asked. Prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

GPUS = ("H100-SXM", "H200", "H20")
OPS = """\
max_tokens: 256
ops:
  - {op: fp8_gemm_nt, n: 576, k: 512}
  - {op: fp8_gemm_nt, n: 2112, k: 7168}
  - {op: m_grouped_fp8_gemm_nt_contiguous, experts: 2, topk: 1, n: 256, k: 512}
"""
LOG = "FLEET_KILLS_LOG"


def watch_store() -> None:
    """Have this process log its dealings with the store; `sitecustomize` of the benchmark's processes calls it."""
    from cachebuilder.ship.shared import SharedStore

    log = open(os.environ[LOG], "a", buffering=1)  # noqa: SIM115  # as long as the process
    get, put = SharedStore.get, SharedStore.put

    def logged_get(self: SharedStore, names: Any) -> Any:
        results, now = get(self, names), time.time()
        for name in names:
            log.write(f"{now} get {os.getpid()} {name} {'hit' if name in results else 'miss'}\n")
        return results

    def logged_put(self: SharedStore, name: str, data: bytes) -> None:
        put(self, name, data)
        log.write(f"{time.time()} put {os.getpid()} {name} -\n")

    SharedStore.get, SharedStore.put = logged_get, logged_put  # type: ignore[method-assign]


def compiled_twice(log: Path) -> tuple[int, int]:
    """How many kernels were put by two processes; how many of these the second had asked for when they were there."""
    first_put: dict[str, float] = {}
    asked: dict[tuple[str, str], float] = {}
    twice = wrongly = 0
    for line in sorted(log.read_text().splitlines(), key=lambda line: float(line.split()[0])):
        now, what, process, name, answer = line.split()
        if not name.startswith("kernels/"):
            continue
        if what == "get" and answer == "miss":
            asked[process, name] = float(now)
        elif what == "put":
            if name in first_put:
                twice += 1
                wrongly += asked.get((process, name), 0.0) > first_put[name]
            first_put.setdefault(name, float(now))
    return twice, wrongly


def environment(folder: Path, cache: str) -> dict[str, str]:
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text("import fleet_kills\n\nfleet_kills.watch_store()\n")
    paths = [str(hooks), str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(":")]
    return os.environ | {
        "PYTHONPATH": ":".join(filter(None, paths)), LOG: str(folder / "log"), "RAY_DEDUP_LOGS": "0",
        "CACHEBUILDER_CACHE_DIR": str(folder / cache),
    }  # fmt: skip


def write_fleet(folder: Path, store: str, legacy: Path) -> Path:
    for gpu in GPUS:
        (folder / f"small-{gpu}.yaml").write_text(f"name: small-{gpu}\ntarget: {{gpu: {gpu}}}\n{OPS}")
    fleet = {
        "name": "kills", "store": store, "models": {"small": {"manifest": "small-{gpu}.yaml"}}, "gpus": list(GPUS),
        "engines": {"new": {"engine": "sglang"}, "old": {"engine": "vllm", "deep_gemm": str(legacy.absolute())}},
    }  # fmt: skip
    path = folder / "fleet.yaml"
    path.write_text(json.dumps(fleet))
    return path


def cli(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cachebuilder", *map(str, arguments)]


def alone(folder: Path, legacy: Path) -> dict[str, str]:
    """The sha256 of each cell's artifact, built by itself."""
    digests = {}
    for gpu in GPUS:
        for engine, more in (("new", []), ("old", ["--deep-gemm", legacy])):
            output = folder / "alone.tar.zst"
            command = cli("build", folder / f"small-{gpu}.yaml", *more, "-o", output, "-q")
            subprocess.run(
                command, env=os.environ | {"CACHEBUILDER_CACHE_DIR": str(folder / "cache-alone")}, check=True
            )
            digests[f"small-{gpu}-{engine}"] = hashlib.sha256(output.read_bytes()).hexdigest()
    return digests


def packed(folder: Path, fleet: Path) -> dict[str, str]:
    shutil.rmtree(folder / "dist", ignore_errors=True)
    command = cli("fleet", "pack", fleet, "-o", folder / "dist", "-q")
    subprocess.run(
        command,
        env=os.environ | {"CACHEBUILDER_CACHE_DIR": str(folder / "cache-pack")},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {
        p.name.removesuffix(".tar.zst"): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("dist/*/*.zst")
    }


def report(folder: Path, fleet: Path, wanted: dict[str, str], **facts: object) -> bool:
    artifacts = packed(folder, fleet)
    equal = len(artifacts) == 4 and all(wanted[name] == digest for name, digest in artifacts.items())
    twice, wrongly = compiled_twice(folder / "log")
    print(
        json.dumps(
            {
                **facts,
                "artifacts": len(artifacts),
                "equal_bytes": equal,
                "kernels_twice": twice,
                "of_these_in_the_store": wrongly,
            }
        ),
        flush=True,
    )
    return equal and not wrongly


@click.group()
def main() -> None:
    """See the module."""


@main.command()
@click.argument("legacy", type=click.Path(path_type=Path, exists=True))
@click.option("--kills", default=20)
@click.option("--seed", default=1)
def ray(legacy: Path, kills: int, seed: int) -> None:
    numbers, folder = random.Random(seed), Path(tempfile.mkdtemp())
    write_fleet(folder, "store", legacy)
    wanted = alone(folder, legacy)
    killed: Counter[str] = Counter()
    builds, good = 0, True
    while killed.total() < kills:
        builds += 1
        for name in ("store", "log", "cache"):
            path = folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        good &= build_with_kills(folder, numbers, killed, kills)
        good &= report(folder, folder / "fleet.yaml", wanted, build=builds, killed=dict(killed), seed=seed)
    sys.exit(not good)


def build_with_kills(folder: Path, numbers: random.Random, killed: Counter[str], kills: int) -> bool:
    """One build on a cluster of three nodes, in which something dies every few seconds; whether it finished."""
    from ray.cluster_utils import Cluster

    os.environ.update(environment(folder, "cache"))  # the cluster's processes inherit it
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    command = cli("fleet", "build", folder / "fleet.yaml", "--on", "ray", "--address", cluster.address, "-q")
    try:
        driver = subprocess.Popen(command)
        while True:
            try:
                code = driver.wait(numbers.uniform(3, 12))
            except subprocess.TimeoutExpired:
                code = None
            if code is not None:
                return code == 0
            if killed.total() >= kills:
                continue
            victim = numbers.choice(["worker", "worker", "node", "driver"])
            if victim == "driver":
                driver.kill()
                driver.wait()
                driver = subprocess.Popen(command)
            elif victim == "node":
                cluster.remove_node(nodes.pop(numbers.randrange(len(nodes))), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
            elif pids := pgrep("cachebuilder.fleet.worker" if numbers.random() < 0.5 else "ray::run_job"):
                os.kill(numbers.choice(pids), signal.SIGKILL)
            else:
                continue
            killed[victim] += 1
    finally:
        cluster.shutdown()


def pgrep(pattern: str) -> list[int]:
    return [int(pid) for pid in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()]


@main.command()
@click.argument("legacy", type=click.Path(path_type=Path, exists=True))
@click.option("--shards", "count", default=4)
@click.option("--seed", default=1)
def shards(legacy: Path, count: int, seed: int) -> None:
    """Shards of one fleet, with one S3 server between them; two are killed."""
    numbers, folder = random.Random(seed), Path(tempfile.mkdtemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "fleet",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(settings)
    fleet = write_fleet(folder, "s3://fleet/kills", legacy)
    wanted = alone(folder, legacy)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(10)
        import fsspec

        fsspec.filesystem("s3").mkdir("fleet")
        running = {
            index: subprocess.Popen(
                cli("fleet", "build", fleet, "--shard", f"{index}/{count}", "--patience", "20", "-q"),
                env=environment(folder, f"cache-{index}"),
                start_new_session=True,
            )
            for index in range(1, count + 1)
        }
        for index in numbers.sample(list(running), 2):
            time.sleep(numbers.uniform(8, 25))
            os.killpg(running[index].pid, signal.SIGKILL)
        codes = {index: process.wait() for index, process in running.items()}
        good = report(folder, fleet, wanted, shards=count, ended=codes, seed=seed)
    finally:
        server.kill()
    sys.exit(not good)


if __name__ == "__main__":
    main()
