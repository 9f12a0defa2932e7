"""Runs in every Python process of an observed program: writes down each call of a function of DeepGEMM.

Python imports a module of this name at its start (``site``). It changes a few modules as soon as they are imported:
each copy of DeepGEMM (`_cachebuilder_calls`), the engine's (`_cachebuilder_vllm`, `_cachebuilder_sglang`), those of
groups of processes (`_cachebuilder_ranks`) and of other compilers (`_cachebuilder_compilers`). All of these import
nothing but the standard library and each other.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import _cachebuilder_calls as calls  # type: ignore[import-not-found]
import _cachebuilder_compilers as compilers  # type: ignore[import-not-found]
import _cachebuilder_ranks as ranks  # type: ignore[import-not-found]
import _cachebuilder_sglang as sglang  # type: ignore[import-not-found]
import _cachebuilder_vllm as vllm  # type: ignore[import-not-found]

#: The names under which engines import a DeepGEMM: PyPI's, and vLLM's own copy (vllm/utils/deep_gemm.py, 0.25.0).
COPIES = ("deep_gemm", "vllm.third_party.deep_gemm")
#: A module → what is done to it after its import.
AFTER_IMPORT = dict.fromkeys(COPIES, calls.wrap_functions) | {
    "flashinfer.gemm.gemm_base": calls.wrap_flashinfer,
    "vllm.config.vllm": vllm.note_settings,
    "vllm.model_executor.model_loader.base_loader": vllm.note_loaded_weights,
    "vllm.model_executor.layers.attention.mla_attention": vllm.note_context_chunk,
    "vllm.model_executor.layers.fused_moe.expert_map_manager": vllm.log_no_experts,
    "vllm.utils.system_utils": vllm.fork_with_a_gpu,
    "vllm.v1.worker.gpu_model_runner": vllm.strides_without_memory,
    "vllm.v1.sample.rejection_sampler": vllm.accept_every_draft,
    "vllm.v1.worker.mamba_utils": vllm.one_accepted_token_at_least,
    "sglang.srt.entrypoints.engine": sglang.fork_processes,
    "sglang.srt.managers.scheduler": sglang.note_settings,
    "sglang.srt.layers.moe.moe_runner.deep_gemm": sglang.both_layouts,
    "sglang.srt.layers.quantization.kv_cache": sglang.default_scales_of_keys,
    "sglang.srt.layers.attention.linear.lightning_backend": sglang.no_tracked_states,
    "sglang.srt.speculative.eagle_utils": sglang.one_token_a_draft,
    "sglang.srt.model_executor.model_runner": sglang.note_loaded_weights,
    "sglang.srt.model_executor.forward_batch_deepseek_mha_mixin": sglang.note_context_chunk,
}
if os.environ.get("CACHEBUILDER_OBSERVE_COMPILE_NOTHING"):
    AFTER_IMPORT |= {
        "cutlass.cute": compilers.no_cute_dsl,
        "flashinfer.autotuner": compilers.no_tactics,
        "flashinfer.jit.core": compilers.no_flashinfer,
        "flashinfer.jit.cubin_loader": compilers.no_cubins,
        "sglang.kernels.jit.cute_aot_cache": sglang.keep_no_kernels,
        "sglang.kernels.jit.utils.compile.loader": sglang.no_modules,
        "sglang.kernels.ops.attention.fla.index": sglang.one_chunk_a_sequence,
        "sglang.kernels.ops.attention.dsv4.compress": sglang.plan_nothing,
        "sglang.kernels.jit.utils.occupancy": sglang.one_cluster,
        "tilelang.jit.kernel": compilers.no_tilelang,
        "triton.runtime.jit": compilers.no_triton,
        "triton.runtime.autotuner": compilers.no_tuning,
    }
if os.environ.get("CACHEBUILDER_BAKE"):
    AFTER_IMPORT = {
        "torch._inductor.runtime.autotune_cache": compilers.no_choice_kept,
        "vllm.config.vllm": vllm.note_settings,
    }
if os.environ.get("CACHEBUILDER_OBSERVE_STAGES"):
    AFTER_IMPORT |= {"sglang.srt.layers.attention.dsa.dsa_indexer": sglang.stages_of_both_kinds}
if os.environ.get("CACHEBUILDER_OBSERVE_RANKS"):
    AFTER_IMPORT |= {
        "torch.distributed.distributed_c10d": ranks.one_rank_of_many,
        "vllm.distributed.parallel_state": ranks.all_ranks_on_this_machine,
        "vllm.distributed.device_communicators.shm_broadcast": ranks.no_message_queue,
        "torch.distributed._symmetric_memory": ranks.plain_memory,
        "vllm.distributed.utils": vllm.group_of_engines,
        "vllm.v1.worker.dp_utils": vllm.engines_do_the_same,
        "vllm.v1.worker.gpu.dp_utils": vllm.engines_do_the_same,
        "vllm.v1.engine.coordinator": vllm.coordinate_one_engine,
        "vllm.v1.engine.utils": vllm.start_one_engine,
        "sglang.srt.entrypoints.engine": sglang.one_scheduler_forked,
        "sglang.srt.managers.data_parallel_controller": sglang.one_group,
        "sglang.srt.distributed.parallel_state": ranks.all_ranks_on_this_machine,
        "sglang.srt.distributed.device_communicators.shm_broadcast": ranks.no_message_queue,
    }
    if os.environ.get("CACHEBUILDER_EACH_RANK"):
        AFTER_IMPORT |= {
            "torch.distributed.distributed_c10d": ranks.silent_gpus,
            "sglang.srt.entrypoints.engine": sglang.fork_processes,
        }
        del AFTER_IMPORT["sglang.srt.managers.data_parallel_controller"]


class AfterImport(importlib.abc.MetaPathFinder):
    """Does to each module of `AFTER_IMPORT` what is to be done, as soon as the module has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders have, with a loader that does it afterwards."""
        if name not in AFTER_IMPORT:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                load = spec.loader.exec_module

                def exec_module(module: ModuleType, load: Any = load) -> None:
                    load(module)
                    AFTER_IMPORT[name](module)

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


def run_the_next_sitecustomize() -> None:
    """Run the module of this name that this one hides, as Python would have done without this one."""
    own = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != own]
    spec = importlib.machinery.PathFinder.find_spec(__name__, others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if calls.FOLDER:
    sys.meta_path.insert(0, AfterImport())
run_the_next_sitecustomize()
