"""What an engine takes from FlashInfer for a model, which FlashInfer would compile at run time."""

from __future__ import annotations

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import Derived
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.errors import ModelError
from cachebuilder.flashinfer.schema import FlashInferNeeds, Gemm

#: The head sizes for which vLLM takes FlashInfer's ``concat_mla``: heads on a rank, and of each the part without and
#: with rotation (vllm/model_executor/layers/attention/mla_attention.py, 0.25.0 to 0.33.0).
_CONCAT_MLA = (128, 128, 64)


#: vLLM samples by FlashInfer's kernels wherever a request has top_k or top_p (vllm/v1/sample/ops/topk_topp_sampler.py,
#: 0.25.0 to 0.33.0).
_SAMPLER = "sampling"


def flashinfer_needs(config: Config, serving: Serving, derived: Derived) -> FlashInferNeeds:
    """What vLLM on SM90 takes from FlashInfer: the GEMM of block-FP8 layers for M < 32, its sampler, ``concat_mla``.

    vLLM's condition for the GEMM is DeepGEMM's for the same layer, and FlashInfer's own for N and K (see `Gemm`).

    Raises:
        ModelError: no rule here says what this engine takes on this GPU.
    """
    if serving.name != "vllm" or serving.gpu.major != 9:
        raise ModelError(
            f"--with-flashinfer: wanted vLLM on an SM90 GPU, found {serving.name} on {serving.gpu.name}",
            hint="cachebuilder observe --with-flashinfer lets the engine say what it takes",
        )
    shapes = {
        (item.op.n, item.op.k): None  # type: ignore[attr-defined]
        for item in derived.ops
        if item.op.op == "fp8_gemm_nt" and item.op.n % 64 == 0 and item.op.k % 128 == 0  # type: ignore[attr-defined]
    }
    modules = [_SAMPLER]
    if config.has("kv_lora_rank"):
        heads = config.number("num_attention_heads") // serving.ranks.attention
        sizes = heads, config.number("qk_nope_head_dim"), config.number("qk_rope_head_dim", least=0)
        modules = ["concat_mla", _SAMPLER] if sizes == _CONCAT_MLA else modules
    return FlashInferNeeds(modules=modules, gemms=[Gemm(n=n, k=k) for n, k in shapes])
