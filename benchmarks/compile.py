"""Compare grouped with separate compilation of one manifest's kernels, in one run, without the store.

    python benchmarks/compile.py [MANIFEST...] [--kernels N ...] [--jobs N ...] [--separate] [--floor] [--memory]
                                 [--commit HASH] [--machine TEXT] >> benchmarks/results/compile.jsonl

The first line says what was run and on what machine. Then follows one JSON object for each measurement: for each count
of kernels and of jobs, the wall and CPU seconds, and the limit (CPU ÷ jobs). ``--memory`` adds the most memory that all
compilers had at once (proportional set sizes, read twice a second, which makes the run slower). ``--separate`` also
compiles the kernels one by one, and adds the ratios. ``--floor`` adds where the CPU time goes on one core: the front
end, which is paid once for each unit, and LLVM and ptxas, which are paid for each kernel and which no grouping can
share. The CPU of separate compilation ÷ that of LLVM and ptxas is the most that any grouping could gain.
`benchmarks/plot.py` draws the results.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType

import click

from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.cores import available_cores
from cachebuilder.common.version import __version__
from cachebuilder.compiling import compiler as compiling
from cachebuilder.compiling import units
from cachebuilder.compiling.compiler import Compiled, CompileOptions
from cachebuilder.compiling.front_end import FrontEnds
from cachebuilder.compiling.steps import Steps
from cachebuilder.compiling.store import NoStore
from cachebuilder.cuda.processes import Processes
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.plan import Kernel

DEFAULT = Path(__file__).parents[1] / "manifests" / "deepseek-v3-tp8-h200.yaml"


class Memory:
    """Watches the memory of this process's descendants; ``peak`` is the most they had at once, in bytes."""

    peak = 0

    def __enter__(self) -> Memory:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.peak = max(self.peak, sum(map(_proportional_set, _descendants())))


def _descendants() -> list[int]:
    """The processes that this process started, and those that these started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    descendants: list[int] = []
    pending = children.get(os.getpid(), [])
    while pending:
        process = pending.pop()
        descendants.append(process)
        pending += children.get(process, [])
    return descendants


def _proportional_set(process: int) -> int:
    """The proportional set size of a process in bytes; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def floor(kernels: Sequence[Kernel], inputs: Inputs) -> dict[str, float]:
    """CPU seconds on one core: of the front ends for all headers, and of LLVM and ptxas for all kernels."""
    with scratch_folder() as scratch:
        processes = Processes()
        steps = Steps(FrontEnds(inputs, 1), scratch, lambda kernel, cubin: None)
        work = units.group(kernels, 1)
        before = _cpu()
        for number, unit in enumerate(work):
            folder = scratch / f"head-{number}"
            folder.mkdir()
            (folder / "kernel.cu").write_text(unit.head + "\n")
            (folder / "include").symlink_to(inputs.installation.include)
            command = inputs.toolchain.ptx_command("kernel.cu", "kernel.ptx", unit.flags, "include")
            processes.run(command, folder)
        after_front_ends = _cpu()
        modules = [
            (kernel, module) for unit in work for kernel, module in zip(unit.kernels, steps.to_ptx(unit), strict=True)
        ]
        after_ptx = _cpu()
        for number, (kernel, module) in enumerate(modules):
            folder = scratch / f"ptx-{number}"
            folder.mkdir()
            (folder / "kernel.ptx").write_text(module.text)
            processes.run(inputs.toolchain.cubin_command("kernel.ptx", "kernel.cubin", kernel.flags), folder)
        front_ends = after_front_ends - before
        return {
            "front_ends": len(work),
            "front_end_cpu_seconds": round(front_ends, 1),
            # `to_ptx` ran the front ends again, so their share is subtracted.
            "llvm_cpu_seconds": round(after_ptx - after_front_ends - front_ends, 1),
            "ptxas_cpu_seconds": round(_cpu() - after_ptx, 1),
        }


@click.command()
@click.argument("manifests", nargs=-1, type=click.Path(path_type=Path))
@click.option("--kernels", multiple=True, type=int, help="This many random kernels of the plan; default: all.")
@click.option("--jobs", multiple=True, type=int, help="Default: all cores.")
@click.option("--separate", is_flag=True)
@click.option("--floor", "with_floor", is_flag=True)
@click.option("--memory", "with_memory", is_flag=True)
@click.option("--deep-gemm", type=click.Path(path_type=Path))
@click.option("--commit", default="")
@click.option("--machine", default="", help="A description of this machine, for the record.")
def main(
    manifests: tuple[Path, ...],
    kernels: tuple[int, ...],
    jobs: tuple[int, ...],
    separate: bool,
    with_floor: bool,
    with_memory: bool,
    deep_gemm: Path | None,
    commit: str,
    machine: str,
) -> None:
    def say(**figures: object) -> None:
        print(json.dumps(figures), flush=True)

    for manifest in manifests or (DEFAULT,):
        inputs = load_manifest(manifest, deep_gemm=deep_gemm)
        plan = planning.make(inputs)
        say(
            what="run",
            command="python benchmarks/compile.py",
            manifest=manifest.stem,
            commit=commit,
            cachebuilder=__version__,
            deep_gemm=inputs.installation.version,
            nvcc=inputs.toolchain.release,
            cores=available_cores(),
            machine=machine,
        )
        for count in kernels or (len(plan.kernels),):
            chosen = random.Random(count).sample(plan.kernels, min(count, len(plan.kernels)))
            for job_count in jobs or (available_cores(),):
                compiled: dict[str, Compiled] = {}
                for way in ("grouped", "separate") if separate else ("grouped",):
                    memory = Memory()
                    with memory if with_memory else nullcontext():
                        options = CompileOptions(job_count, grouped=way == "grouped", check_code=0)
                        compiled[way] = compiling.compile_kernels(inputs, chosen, options, NoStore())
                    say(
                        what="compile",
                        manifest=manifest.stem,
                        way=way,
                        kernels=len(chosen),
                        jobs=job_count,
                        wall_seconds=round(compiled[way].wall_seconds, 1),
                        cpu_seconds=round(compiled[way].cpu_seconds, 1),
                        limit_seconds=round(compiled[way].cpu_seconds / job_count, 1),
                        **({"peak_memory_mb": round(memory.peak / 1e6)} if with_memory else {}),
                    )
                if separate:
                    one, other = compiled["separate"], compiled["grouped"]
                    say(
                        what="ratio",
                        manifest=manifest.stem,
                        kernels=len(chosen),
                        jobs=job_count,
                        cpu=round(one.cpu_seconds / other.cpu_seconds, 2),
                        wall=round(one.wall_seconds / other.wall_seconds, 2),
                        equal_bytes=one.cubins == other.cubins,
                    )
        if with_floor:
            say(what="floor", manifest=manifest.stem, kernels=len(plan.kernels), **floor(plan.kernels, inputs))


if __name__ == "__main__":
    main()
