"""Compare grouped with separate compilation of a manifest's kernels, in one run, without the store.

    python benchmarks/compile.py [MANIFEST...] [--kernels N ...] [--jobs N ...] [--separate] [--floor] [--memory]
                                 [--commit HASH] [--machine TEXT] >> benchmarks/results/compile.jsonl

The first line says what was run and on what machine. Then follows one JSON object for each measurement: for each number of
kernels and of jobs, the wall and CPU seconds, and the limit (CPU ÷ jobs).

``--memory`` adds the most memory that all compilers had at once (proportional set sizes, sampled twice a second, which slows
the wall clock). ``--separate`` adds the compilation one by one, and the ratios. ``--floor`` adds, on one core, where the CPU
time goes: the cost of a front end, once a unit, and the work of LLVM and ptxas on each kernel, which no grouping can share.
Separate ÷ that work is the most that any grouping could gain. `benchmarks/plot.py` draws the results.
"""

from __future__ import annotations

import json
import random
import resource
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType

import click

from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.version import __version__
from cachebuilder.compiling import compiler as compiling
from cachebuilder.compiling import units
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.compiling.front_end import FrontEnds
from cachebuilder.compiling.steps import Steps
from cachebuilder.compiling.store import NoStore
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.plan import Kernel

DEFAULT = Path(__file__).parents[1] / "manifests" / "deepseek-v3-tp8-h200.yaml"


class Memory:
    """The most memory that this process's descendants had at once, in bytes."""

    peak = 0

    def __enter__(self) -> Memory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self.peak = max(self.peak, sum(map(_proportional_set, _descendants())))


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, pending = [], children.get(int(Path("/proc/self").resolve().name), [])
    while pending:
        found.append(pending.pop())
        pending += children.get(found[-1], [])
    return found


def _proportional_set(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def floor(kernels: Sequence[Kernel], inputs: Inputs) -> dict[str, float]:
    """CPU seconds on one core: of all front ends, and of LLVM and ptxas for all kernels."""
    made: dict[str, bytes] = {}
    with scratch_folder() as scratch:
        steps = Steps(FrontEnds(inputs, 1), scratch, lambda kernel, cubin: made.update({kernel.entry: cubin}))
        work = units.group(kernels, 1)
        before = _cpu()
        for number, unit in enumerate(work):
            (folder := scratch / f"head-{number}").mkdir()
            (folder / "kernel.cu").write_text(unit.head + "\n")
            (folder / "include").symlink_to(inputs.installation.include)
            command = inputs.toolchain.ptx_command("kernel.cu", "kernel.ptx", unit.flags, "include")
            steps._processes.run(command, folder)
        heads = _cpu()
        modules = [
            (kernel, module) for unit in work for kernel, module in zip(unit.kernels, steps.to_ptx(unit), strict=True)
        ]
        ptx = _cpu()
        for kernel, module in modules:
            steps._to_cubin(kernel, module)
        return {
            "front_ends": len(work),
            "front_end_cpu_seconds": round(heads - before, 1),
            "llvm_cpu_seconds": round(ptx - heads - (heads - before), 1),
            "ptxas_cpu_seconds": round(_cpu() - ptx, 1),
        }


@click.command()
@click.argument("manifests", nargs=-1, type=click.Path(path_type=Path))
@click.option("--kernels", multiple=True, type=int, help="Random kernels of the plan; default: all.")
@click.option("--jobs", multiple=True, type=int, help="Default: all cores.")
@click.option("--separate", is_flag=True)
@click.option("--floor", "with_floor", is_flag=True)
@click.option("--memory", "with_memory", is_flag=True)
@click.option("--deep-gemm", type=click.Path(path_type=Path))
@click.option("--commit", default="")
@click.option("--machine", default="", help="What this is, for the record.")
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
            cores=compiling.available_cores(),
            machine=machine,
        )
        for count in kernels or (len(plan.kernels),):
            chosen = random.Random(count).sample(plan.kernels, min(count, len(plan.kernels)))
            for job_count in jobs or (compiling.available_cores(),):
                found = {}
                for grouped in (True, False) if separate else (True,):
                    memory = Memory()
                    with memory if with_memory else nullcontext():
                        options = CompileOptions(job_count, grouped=grouped, check_code=0)
                        report = compiling.compile_kernels(inputs, chosen, options, NoStore())
                    found[grouped] = (report.cubins, report)
                    say(
                        what="compile",
                        manifest=manifest.stem,
                        way="grouped" if grouped else "separate",
                        kernels=len(chosen),
                        jobs=job_count,
                        wall_seconds=round(report.wall_seconds, 1),
                        cpu_seconds=round(report.cpu_seconds, 1),
                        limit_seconds=round(report.cpu_seconds / job_count, 1),
                        **({"peak_memory_mb": round(memory.peak / 1e6)} if with_memory else {}),
                    )
                if separate:
                    (ours, grouped_report), (own, separate_report) = found[True], found[False]
                    say(
                        what="ratio",
                        manifest=manifest.stem,
                        kernels=len(chosen),
                        jobs=job_count,
                        cpu=round(separate_report.cpu_seconds / grouped_report.cpu_seconds, 2),
                        wall=round(separate_report.wall_seconds / grouped_report.wall_seconds, 2),
                        equal_bytes=ours == own,
                    )
        if with_floor:
            say(what="floor", manifest=manifest.stem, kernels=len(plan.kernels), **floor(plan.kernels, inputs))


if __name__ == "__main__":
    main()
