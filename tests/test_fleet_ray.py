"""A fleet on Ray, on loopback: real nodes of a real cluster, which are processes of this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachebuilder.errors import CacheBuilderError, TransferError
from cachebuilder.fleet.executors import Task
from cachebuilder.fleet.on_ray import OnRay
from cachebuilder.fleet.protocol import ProbeJob, Tools
from cachebuilder.ship.shared import open_store
from tests.conftest import Run
from tests.test_fleet import alone, folder, packed

__all__ = ["alone", "folder"]

#: The fleets here name the DeepGEMM of each engine.
GENERATIONS = ("deepjit",)

pytestmark = pytest.mark.slow


def workers(driver: int) -> list[int]:
    """The processes in which Ray runs tasks of the cluster that ``driver`` has started."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    below, more = {driver}, True
    while more:
        found = {int(pid) for pid, parent, _ in rows if int(parent) in below} - below
        below |= found
        more = bool(found)
    return [int(pid) for pid, _, command in rows if int(pid) in below and "fleet.worker" in command]


def test_a_killed_worker_and_a_killed_driver_cost_no_artifact(folder: Path, run: Run, alone: dict[str, str]) -> None:
    path = folder / "fleet.yaml"
    command = [sys.executable, "-m", "cachebuilder", "fleet", "build", str(path), "--on", "ray"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    killed = 0
    for _ in range(1200):  # a worker dies when it has been started, and the driver as soon as a plan is in the store
        if not killed and (pids := workers(driver.pid)):
            os.kill(pids[0], signal.SIGKILL)
            killed = pids[0]
        if (folder / "store/plans").exists() or driver.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert killed
    plans = open_store(str(folder / "store")).names("plans")
    done = run("fleet", "build", path, "--on", "ray")
    assert done.returncode == 0, done.stderr
    planned = re.search(r"planned   (\d)", done.stdout)
    assert plans and planned and int(planned[1]) <= 4 - len(plans)  # a worker without a driver finishes its job
    artifacts = packed(run, folder)
    assert len(artifacts) == 4 and artifacts == {name: alone[name] for name in artifacts}


def test_a_task_for_an_image_runs_only_on_a_node_that_has_it() -> None:
    """The resource of the engine's name, which a node of that image is started with."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1, resources={"new": 1})
        with OnRay(cluster.address, {"new": sys.executable}, frozenset({"new"}), run=_where) as ray:
            nodes = {_node(answer) for _, answer in ray.run([Task("new", ProbeJob(tools=Tools(), manifests=()))] * 4)}
        assert nodes == {node.node_id}
    finally:
        cluster.shutdown()


def _where(python: str, job: str) -> str:
    """A job whose answer is the node that it ran on."""
    import ray

    from cachebuilder.fleet.protocol import Planned

    return Planned(key=ray.get_runtime_context().get_node_id(), seconds=0).model_dump_json()


def _node(answer: object) -> str:
    assert not isinstance(answer, CacheBuilderError), answer
    return str(answer.key)  # type: ignore[attr-defined]


def test_a_cluster_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(TransferError, match=r"Ray at 127.0.0.1:1: ") as caught:
        OnRay("127.0.0.1:1", {})
    assert "ray status" in str(caught.value.hint)
