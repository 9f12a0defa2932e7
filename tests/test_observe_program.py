"""What a program does on the virtual GPU of an observation: it takes from FlashInfer, and captures graphs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cachebuilder.authoring.observe import program
from cachebuilder.authoring.observe.command import Launch
from cachebuilder.authoring.observe.flashinfer import flashinfer_needs, missing_needs
from cachebuilder.common.progress import no_progress
from cachebuilder.cuda import gpus, toolchain
from cachebuilder.flashinfer.schema import FlashInferNeeds, Gemm
from cachebuilder.sweep.recorder import recording_compiler
from tests.conftest import FLASHINFER

pytestmark = pytest.mark.slow


def run(text: str, folder: Path, **variables: str) -> program.Run:
    """Run a program on a virtual H200, as an engine is run."""
    (folder / "program.py").write_text(text)
    (work := folder / "work").mkdir()
    compiler = recording_compiler(work, toolchain.find().version_text)
    setting = program.Setting(gpus.find("H200"), compiler, work, os.environ)
    launch = Launch((sys.executable, str(folder / "program.py")), variables, (), None)
    return program.run(launch, setting, no_progress)


TAKES_FROM_FLASHINFER = f"""
import sys

sys.path.append({str(FLASHINFER.parent)!r})
import deep_gemm
import torch
from flashinfer.gemm import fp8_blockscale_gemm_sm90
from flashinfer.jit.page import gen_page_module


def linear(m: int) -> None:
    # As vLLM: FlashInfer for M < 32, DeepGEMM from there on.
    activations = torch.empty(m, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.empty(768, 512, device="cuda", dtype=torch.float8_e4m3fn)
    scales = torch.empty(6, 4, device="cuda", dtype=torch.float32)
    if m < 32:
        fp8_blockscale_gemm_sm90(activations, weight, None, scales, out_dtype=torch.bfloat16)
    else:
        a = torch.empty(m, 512, device="cuda", dtype=torch.float8_e4m3fn), torch.empty(m, 4, device="cuda")
        deep_gemm.fp8_gemm_nt(a, (weight, scales), torch.empty(m, 768, device="cuda", dtype=torch.bfloat16))


gen_page_module().build_and_load()
for m in (1, 15, 31, 32, 63):
    linear(m)
"""


def test_modules_and_gemms_are_written_down_and_m_goes_to_where_deepgemm_takes_over(tmp_path: Path) -> None:
    observed = run(
        TAKES_FROM_FLASHINFER,
        tmp_path,
        CACHEBUILDER_OBSERVE_COMPILE_NOTHING="1",
        FLASHINFER_CUDA_ARCH_LIST="9.0a",
        FLASHINFER_WORKSPACE_BASE=str(tmp_path),
    ).observed
    needs = FlashInferNeeds(modules=["page"], gemms=[Gemm(n=768, k=512, max_m=31)])
    assert flashinfer_needs(observed) == needs
    assert [op.fields for op in observed.ops] == [{"n": 768, "k": 512}]
    assert len(observed.copies) == 1, "FlashInfer was taken for a copy of DeepGEMM"
    assert not [file for file in tmp_path.rglob("*.so") if file.stem in ("page", "fp8_blockscale_gemm_90")]

    known = FlashInferNeeds(modules=["page"], gemms=[Gemm(n=768, k=512, max_m=16)])
    assert missing_needs(needs, known) == FlashInferNeeds(gemms=needs.gemms)
    assert missing_needs(needs, needs) == FlashInferNeeds()


CAPTURES = """
import torch

x = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16)
side, other, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()


def capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


with torch.cuda.graph(graph):
    x @ x
    assert torch.cuda.is_current_stream_capturing() and not capturing(side)
    side.wait_stream(torch.cuda.current_stream())
    assert capturing(side) and not capturing(other)
    torch.cuda.current_stream().wait_stream(side)
assert not capturing(side)
graph.replay()
torch.cuda.synchronize()
"""


def test_a_graph_is_captured_and_an_event_carries_the_capture_to_the_streams_that_wait(tmp_path: Path) -> None:
    assert run(CAPTURES, tmp_path).exit_code == 0


RANKS_OF_PROCESSES = """
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank(own: int, port: int) -> None:
    dist.init_process_group(backend="nccl", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=own)
    gpus, processes = dist.new_group([0, 1], backend="nccl"), dist.new_group([0, 1], backend="gloo")
    told = torch.tensor([7 if own == 0 else 0])
    dist.broadcast(told, src=0, group=processes)
    assert int(told) == 7, told
    values = torch.ones(8, device="cuda")
    dist.all_reduce(values, group=gpus)
    dist.all_gather_into_tensor(torch.empty(16, device="cuda"), values, group=gpus)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank, (port,), nprocs=2)
"""


def test_each_rank_may_be_a_process_that_talks_to_the_others_while_their_gpus_send_nothing(tmp_path: Path) -> None:
    both = {"CACHEBUILDER_OBSERVE_RANKS": "2", "CACHEBUILDER_EACH_RANK": "1"}
    assert run(RANKS_OF_PROCESSES, tmp_path, **both).exit_code == 0
