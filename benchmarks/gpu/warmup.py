"""On the target GPU: DeepGEMM's own serial warm-up against a build with cachebuilder, and the truth of its cache.

    python benchmarks/gpu/warmup.py MANIFEST [--deep-gemm FOLDER] [--skip-warm-up]

1. The device's properties, beside the manifest's target.
2. `build` with no store, grouped and separate: plan and compile.
3. Serving from that cache with a compiler that refuses: every point of every op is called; kernels that were missed,
   and the relative error of dense and grouped FP8 results against an fp32 reference.
4. The cold warm-up that an engine does, in one process with the real nvcc, over vLLM's relaxed list of M
   (vLLM 0.33.0, model_executor/warmup/deep_gemm_warmup.py); its kernels must be among the planned ones.

Prints one JSON object a figure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import zstandard

from cachebuilder import build as building
from cachebuilder.ops import OPS
from cachebuilder.ops.base import Device, ceil_div


def say(what: str, **figures: object) -> None:
    print(json.dumps({"what": what} | figures), flush=True)


def relaxed(max_tokens: int, n: int, sm_count: int) -> list[int]:
    """vLLM's default warm-up list for a dense layer of N columns."""
    values = {1, 2, 4, *range(8, 65, 8)}
    for block_m in (64, 128, 256):
        values.update(range(block_m, max_tokens + 1, block_m))
        for block_n in range(16, min(257, n + 1), 16):
            values.update(wave * sm_count * block_m // ceil_div(n, block_n) for wave in range(1, 11))
    return sorted(value for value in values if 1 <= value <= max_tokens)


def child(job: dict[str, Any]) -> None:
    """Run inside the process whose environment stands for the serving one."""
    import torch

    from cachebuilder.sweep.child import _import_deep_gemm

    device = Device(torch, _import_deep_gemm(job["deep_gemm"]))
    ops = [OPS[fields["op"]].model_validate(fields) for fields in job["ops"]]
    device.deep_gemm.set_num_sms(job["sm_count"])
    started, calls = time.monotonic(), 0
    for op in ops:
        call = op.prepare(device)
        points = op.points(device)
        if job["relaxed"] and op.op == "fp8_gemm_nt":
            points = relaxed(op.largest_m, op.n, job["sm_count"])
        for value in points:
            call(value)
            calls += 1
    torch.cuda.synchronize()
    say("calls", calls=calls, wall_seconds=round(time.monotonic() - started, 2))
    if job["check"]:
        for op in ops:
            say("relative error", op=op.op, shape=op.shape(), **_errors(device, op))


def _quantised(torch: Any, x: Any, rows: int) -> tuple[Any, Any, Any]:
    """FP8 with one scale for ``rows`` × 128 elements; returns data, scales, and what they stand for."""
    m, k = x.shape
    padded = torch.nn.functional.pad(x, (0, -k % 128, 0, -m % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // 128, 128)
    scales = blocks.abs().amax((1, 3), keepdim=True).clamp(1e-4) / 448
    data = (blocks / scales).to(torch.float8_e4m3fn)
    back = (data.float() * scales).view_as(padded)[:m, :k]
    return data.view_as(padded)[:m, :k].contiguous(), scales.view(blocks.shape[0], blocks.shape[2]), back


def _errors(device: Device, op: Any) -> dict[str, object]:
    """The worst relative error (Frobenius) over some M of each size, and where it was."""
    torch = device.torch
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    random = lambda *shape: torch.randn(shape, device="cuda")  # noqa: E731
    worst, at, checked = 0.0, 0, 0
    grouped = op.op != "fp8_gemm_nt"
    experts = op.experts if grouped else 1
    b = [_quantised(torch, random(op.n, op.k), 128) for _ in range(min(experts, 4))]
    points = list(op.points(device))
    for m in sorted({points[0], points[-1], *points[:: max(1, len(points) // 40)], *points[-3:]}):
        if grouped and m > 16384:
            continue
        a, sfa, a_ref = _quantised(torch, random(m, op.k), 1)
        d = torch.full((m, op.n), float("nan"), device="cuda", dtype=torch.bfloat16)
        if grouped:
            data = torch.stack([b[i % len(b)][0] for i in range(experts)])
            scales = torch.stack([b[i % len(b)][1] for i in range(experts)])
            expert = (torch.arange(m, device="cuda") // 128 % experts).int()
            op.function(device.deep_gemm)((a, sfa), (data, scales), d, expert, **op.options())
            reference = torch.cat([a_ref[i : i + 128] @ b[i // 128 % experts % len(b)][2].T for i in range(0, m, 128)])
        else:
            op.function(device.deep_gemm)((a, sfa), (b[0][0], b[0][1]), d, **op.options())
            reference = a_ref @ b[0][2].T
        error = ((d.float() - reference).norm() / reference.norm()).item()
        checked += 1
        if not error <= worst:  # NaN too
            worst, at = error, m
    return {"worst": worst, "at_m": at, "checked": checked}


def run_child(job: dict[str, Any], environment: dict[str, str]) -> tuple[int, float, str]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)],
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )
    sys.stdout.write(done.stdout)
    return done.returncode, time.monotonic() - started, done.stderr[-1500:]


def refusing_nvcc(folder: Path, text: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "version.txt").write_text(text)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec cat {folder}/version.txt\necho "$*" >>{folder}/misses\nexit 1\n'
    )
    nvcc.chmod(0o755)
    return nvcc


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--deep-gemm", type=click.Path(path_type=Path))
@click.option("--skip-warm-up", is_flag=True)
def main(manifest: Path, deep_gemm: Path | None, skip_warm_up: bool) -> None:
    inputs = building.find_inputs(manifest, deep_gemm=deep_gemm)
    say("using", deep_gemm=str(inputs.installation), nvcc=str(inputs.toolchain), cores=len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for grouped in (True, False):
            started = time.monotonic()
            built = building.build(
                inputs, folder / f"{grouped}.tar.zst", use_store=False, grouped=grouped, check_code=0
            )
            say(
                "build",
                way="grouped" if grouped else "separate",
                kernels=len(built.plan.kernels),
                calls=built.plan.calls,
                plan_seconds=round(built.plan_seconds, 2),
                compile_seconds=round(built.compiled.wall_seconds, 2),
                compile_cpu_seconds=round(built.compiled.cpu_seconds, 1),
                pack_seconds=round(built.pack_seconds, 2),
                wall_seconds=round(time.monotonic() - started, 2),
                sha256=built.packed.sha256,
            )
        data = zstandard.ZstdDecompressor().decompress((folder / "True.tar.zst").read_bytes())
        (folder / "artifact.tar").write_bytes(data)
        with tarfile.open(folder / "artifact.tar") as tar:  # our own, made above
            tar.extractall(folder / "root", filter="data")
        planned = {kernel.entry for kernel in built.plan.kernels}
        job = {
            "deep_gemm": str(inputs.installation.path),
            "ops": list(built.plan.ops),
            "sm_count": built.plan.sm_counts[0],
            "relaxed": False,
            "check": True,
        }
        nvcc = refusing_nvcc(folder / "frozen", inputs.toolchain.version_text)
        code, _, errors = run_child(
            job,
            {
                "DG_JIT_CACHE_DIR": str(folder / "root"),
                "DG_JIT_NVCC_COMPILER": str(nvcc),
                "CUDA_HOME": str(folder / "frozen"),
            },
        )
        misses = (
            (folder / "frozen" / "misses").read_text().count("\n") if (folder / "frozen" / "misses").exists() else 0
        )
        say("served from the cache", exit=code, misses=misses, errors=errors if code else "")
        warm = job | {"relaxed": True, "check": False}
        environment = {"DG_JIT_CACHE_DIR": str(folder / "root"), "DG_JIT_NVCC_COMPILER": str(nvcc)}
        code, wall, errors = run_child(warm, environment)
        say(
            "warm-up on the cache, whole process", exit=code, wall_seconds=round(wall, 1), errors=errors if code else ""
        )
        if not skip_warm_up:
            environment = {"DG_JIT_CACHE_DIR": str(folder / "own"), "DG_JIT_NVCC_COMPILER": str(inputs.toolchain.nvcc)}
            code, wall, errors = run_child(warm, environment)
            own = set(os.listdir(folder / "own" / "cache"))
            say(
                "DeepGEMM's own cold warm-up, whole process",
                exit=code,
                wall_seconds=round(wall, 1),
                kernels=len(own),
                not_planned=sorted(own - planned),
                errors=errors if code else "",
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
