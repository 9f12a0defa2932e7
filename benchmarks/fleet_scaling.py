"""How a fleet's jobs scale on Ray: compile jobs of a simulated length, on 1, 2 and 4 workers of this machine.

    python benchmarks/fleet_scaling.py [--units 32] [--kernels 24] [--seconds 10] [--workers 1,2,4]

A simulated job sleeps instead of compiling, and stores a result of 50 kB for each kernel as a real one does, in a folder. So
the jobs need no core, and two cores can show four workers. Everything else is real: Ray, its scheduler, the JSON of the jobs,
the store. Prints one JSON object for each count of workers: seconds, the ideal, their ratio, and what each kernel costs beyond.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import click
from ray.cluster_utils import Cluster

from cachebuilder.compiling.store import shared_name
from cachebuilder.errors import CacheBuilderError
from cachebuilder.fleet.executors import Task
from cachebuilder.fleet.on_ray import OnRay
from cachebuilder.fleet.protocol import JOB, CompileJob, Done, Shared, Tools
from cachebuilder.planning.plan import Kernel
from cachebuilder.ship.shared import open_store

CUBIN_BYTES = 50_000
SOURCE_BYTES = 3_000


def simulate(python: str, text: str) -> str:
    """Sleep as long as a unit compiles, and store its results."""
    job = JOB.validate_json(text)
    assert isinstance(job, CompileJob)
    started = time.monotonic()
    time.sleep(float(job.manifest))
    store = open_store(job.shared.url)
    keys = [hashlib.sha256(kernel.source.encode()).hexdigest() for kernel in job.kernels]
    stored = store.get(list(map(shared_name, keys)))
    for key in keys:
        if shared_name(key) not in stored:
            store.put(shared_name(key), key.encode() * (CUBIN_BYTES // 64))
    done = Done(compiled=len(job.kernels), reused=0, seconds=time.monotonic() - started, cpu_seconds=0)
    return done.model_dump_json()


@click.command()
@click.option("--units", default=32)
@click.option("--kernels", default=24)
@click.option("--seconds", default=10.0, help="What a unit takes to compile.")
@click.option("--workers", default="1,2,4")
def main(units: int, kernels: int, seconds: float, workers: str) -> None:
    for count in map(int, workers.split(",")):
        folder = Path(tempfile.mkdtemp())
        shared = Shared(url=str(folder / "store"), read_only=False, fleet="scaling")
        open_store(shared.url)
        tasks = []
        for unit in range(units):
            some = tuple(
                Kernel(entry="e", name="n", source=f"{unit} {number} " + "x" * SOURCE_BYTES, flags=(), selected_by=())
                for number in range(kernels)
            )
            job = CompileJob(tools=Tools(), shared=shared, manifest=str(seconds), name=str(unit), kernels=some, jobs=1)
            tasks.append(Task("engine", job))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        with OnRay(cluster.address, {"engine": sys.executable}, run=simulate) as ray:
            for _, answer in ray.run(tasks[:count]):  # Ray starts its processes with the first tasks
                assert not isinstance(answer, CacheBuilderError), answer
            started = time.monotonic()
            for _, answer in ray.run(tasks[count:]):
                assert not isinstance(answer, CacheBuilderError), answer
            wall = time.monotonic() - started
        cluster.shutdown()
        left = units - count
        ideal = -(-left // count) * seconds
        facts = {
            "workers": count, "units": left, "kernels": left * kernels, "seconds": round(wall, 2), "ideal": ideal,
            "of_ideal": round(ideal / wall, 3), "overhead_ms_a_kernel": round(1000 * (wall - ideal) * count / (left * kernels), 2),
            "cores": os.cpu_count(),
        }  # fmt: skip
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
