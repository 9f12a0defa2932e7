"""The functions of DeepGEMM that have no op, each with the reason; a test compares the list with the installed copy."""

from __future__ import annotations

from fnmatch import fnmatch
from types import ModuleType

from cachebuilder.ops.base import OpBase

_SETTING = "a setting or a question: it launches nothing"
_ALIAS = "another name of a function that has an op"
_TORCH = "plain torch: it launches no kernel of DeepGEMM's own"

#: A name or a pattern of names → why there is no op. The docs show this table.
WITHOUT_OP: dict[str, str] = {
    "set_*": _SETTING,
    "get_num_sms": _SETTING,
    "get_tc_util": _SETTING,
    "get_pdl": _SETTING,
    "get_*deterministic_algorithms": _SETTING,
    "use_deterministic_algorithms": _SETTING,
    "get_*alignment_for_contiguous_layout": _SETTING,
    "get_tma_aligned_size": _SETTING,
    "get_block_m_for_*mega_moe": _SETTING,
    "get_bf16_mega_gate_config": _SETTING,
    "get_num_locality_domains": _SETTING,
    "is_locali*": _SETTING,
    "find_cuda_home": _SETTING,
    "get_cuda_arch": _SETTING,
    "init": _SETTING,
    "shutdown": _SETTING,
    "destroy_localizer": _SETTING,
    "cublaslt_*": "cuBLASLt's kernels, which nobody compiles",
    "batched_sy*": "cuBLASLt's kernels, which nobody compiles",
    "get_symm_buffer_for_*mega_moe": "memory only",
    "transform_weights_for_mega_moe*": _TORCH,
    "transform_scales_for_mega_moe": _TORCH,
    "fp8_fp4_gemm_nn": "fp8_gemm_nn's function; FP4 weights are K-major in every engine",
    "fp8_fp4_gemm_tn": "fp8_gemm_tn's function; FP4 weights are K-major in every engine",
    "fp8_fp4_gemm_tt": "fp8_gemm_tt's function; FP4 weights are K-major in every engine",
    "m_grouped_fp8_fp4_gemm_nn_contiguous": "m_grouped_fp8_gemm_nn_contiguous's function",
    "fp4_gemm_nt": _ALIAS,
    "m_grouped_fp4_gemm_nt_*": _ALIAS,
    "bf16_m_grouped_gemm_nt_masked": _ALIAS,
    "k_grouped_fp4_gemm_nt_contiguous": "of training on SM100; no engine calls it",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor": (
        "launched by k_grouped_fp8_gemm_tn_contiguous, whose op plans it; by itself no engine calls it"
    ),
    "get_mqa_logits_metadata": "SM100's optional schedule of a prefill; vLLM 0.33.0 and SGLang 0.5.23 never ask for it",
    "localize*": "memory beside each half of the SMs and torch's copy into it; weights there select no other kernel",
}

#: DeepGEMM's modules of helpers written in torch, which its `__init__` imports into its own namespace.
_HELPERS = ("deep_gemm.utils.math", "deep_gemm.utils.dist", "deep_gemm.testing")


def functions(deep_gemm: ModuleType) -> list[str]:
    """Names of the public functions that ``deep_gemm`` offers, without its helpers in torch."""
    layout = getattr(deep_gemm.utils, "layout", None)
    public = {}
    for module in filter(None, (layout, deep_gemm)):
        public.update({name: item for name, item in vars(module).items() if not name.startswith("_")})
    return sorted(
        name
        for name, item in public.items()
        if callable(item)
        and not isinstance(item, type)
        and not str(getattr(item, "__module__", "")).startswith((*_HELPERS, "typing"))
    )


def reason(name: str) -> str | None:
    """Why the function ``name`` has no op; None if `WITHOUT_OP` does not list it."""
    return next((text for pattern, text in WITHOUT_OP.items() if fnmatch(name, pattern)), None)


def unexplained(deep_gemm: ModuleType, ops: dict[str, type[OpBase]]) -> list[str]:
    """Functions of ``deep_gemm`` that have no op and are not in `WITHOUT_OP`."""
    planned = {name for model in ops.values() for name in model.entry_points} | ops.keys()
    return [name for name in functions(deep_gemm) if name not in planned and reason(name) is None]
