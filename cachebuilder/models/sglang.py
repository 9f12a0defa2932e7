"""SGLang's rules: what it sends to DeepGEMM, over which M. Read in the wheel of 0.5.23."""

from __future__ import annotations

from typing import ClassVar

from cachebuilder.errors import ModelError
from cachebuilder.models.config import Config, path_match, pattern_match
from cachebuilder.models.layers import Call, Experts, LeftOut
from cachebuilder.models.serving import Serving, indexer_calls, knows
from cachebuilder.ops import OPS, OpBase

_CONTIGUOUS, _MASKED = "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"


class Sglang(Serving):
    """An SGLang deployment: ``tp`` ranks in all, in which ``dp`` groups share attention (--enable-dp-attention).

    ``max_tokens`` is the chunked prefill size as given, before SGLang divides it by dp.
    """

    name: ClassVar[str] = "sglang"
    versions: ClassVar[tuple[str, ...]] = ("0.5.23",)

    def check(self, config: Config) -> None:
        """As the base says; besides, dp and ep divide tp (srt/arg_groups/parallel_hook.py)."""
        super().check(config)
        for option, size in (("--dp", self.dp), ("--ep", self.ep)):
            if self.tp % size:
                raise ModelError(
                    f"SGLang divides its {self.tp} tensor parallel ranks: wanted {option} to divide --tp, found {size}"
                )
        if self.low_latency and self.ep == 1:
            raise ModelError("DeepEP dispatches between expert-parallel ranks: wanted --ep above 1, found 1")

    @property
    def attention_ranks(self) -> int:
        """``attn_tp``: tp / dp."""
        return self.tp // self.dp

    @property
    def shared_ranks(self) -> int:
        """All ranks; 1 under DeepEP, where each has the whole shared expert (models/deepseek_v2.py, glm4_moe.py)."""
        return 1 if self.low_latency else self.tp

    @property
    def expert_ranks(self) -> int:
        """As ``moe_tp``: tp / ep."""
        return self.tp // self.ep

    @property
    def largest_m(self) -> int:
        """The end of the list that SGLang's own pre-compilation goes through.

        ``update_deep_gemm_config`` (srt/layers/deep_gemm_wrapper/compile_utils.py): 16 Ki; twice the chunked prefill
        size where that is above 8192; at most 128 Ki. ``_handle_data_parallelism``
        (srt/arg_groups/parallel_hook.py) has divided that size by dp.
        """
        chunk = self.max_tokens // self.dp
        return min(2 * chunk if chunk > 8192 else 16 * 1024, 128 * 1024)

    def fuses_shared_experts(self, config: Config, shared: int) -> bool:
        """``shared_experts_fusion_disable_reason`` of models/deepseek_v2.py and models/glm4_moe.py.

        DeepSeek V3 with 256 experts and one shared, and GLM-4.5 to 4.7: fused, but not under expert parallelism.
        """
        if self.ep > 1 or self.low_latency or not self.moe_deep_gemm:
            return False
        if config.architecture == "Glm4MoeForCausalLM":
            return shared > 0
        return (
            config.architecture == "DeepseekV3ForCausalLM" and shared == 1 and config.number("n_routed_experts") == 256
        )

    def keeps_unquantized(self, config: Config, module: str) -> bool:
        """SGLang matches components of a dotted name (``_module_path_match``, srt/layers/quantization/utils.py)."""
        tail = module.split("layers.", 1)[-1]
        return any(
            path_match(entry.split("layers.", 1)[-1] if "layers." in entry else entry, tail)
            or pattern_match(entry, module)
            for entry in config.unconverted
        )

    def expert_ops(self, experts: Experts, count: int, n: int, k: int) -> list[tuple[OpBase, str]]:
        """Both layouts: srt/layers/moe/moe_runner/deep_gemm.py takes masked or compact rows by free memory.

        Under DeepEP it is contiguous for prefill, masked for decoding. expected_m is about tokens · top-k / experts,
        less than a batch of tokens, in all of them; SGLang's pre-compilation sweeps it to the same end as M.
        """
        rows = self.largest_m
        weights = {"experts": count, "n": n, "k": k}
        contiguous: dict[str, object] = {"op": _CONTIGUOUS, **weights, "topk": experts.topk}
        if self.gpu.major != 9 and knows(_CONTIGUOUS, "alignment"):
            contiguous["alignment"] = "per-call"
        masked = {"op": _MASKED, **weights, "max_m": rows}
        return [
            (OPS[_CONTIGUOUS].model_validate(contiguous), ""),
            (OPS[_MASKED].model_validate(masked), f"expected_m as far as SGLang's own list: {rows}"),
        ]

    def indexer_calls(self, heads: int, what: str) -> list[Call]:
        """srt/layers/attention/dsa/dsa_indexer.py: the FP8 functions, logits at their own columns."""
        return indexer_calls("fp8_mqa_logits", "fp8_paged_mqa_logits", heads, {}, self.max_seqs, what)

    def header(self, config: Config) -> list[str]:
        """As the base says."""
        return [
            "compiled_dims is left out: SGLang passes none, so sgl-deep-gemm's own default holds, nothing compiled in "
            "for dense GEMMs (srt/layers/deep_gemm_wrapper/entrypoint.py).",
            "Linear layers: block-FP8 with N a multiple of 64 and K of 128 (srt/layers/quantization/fp8_utils.py, "
            "_deepgemm_block_fp8_supported). max_tokens is the end of SGLang's own list of M "
            "(srt/layers/deep_gemm_wrapper/compile_utils.py).",
        ]

    def left_out(self, config: Config, has_experts: bool) -> list[LeftOut]:
        """As the base says."""
        found = []
        if has_experts and self.moe_deep_gemm and self.gpu.major != 9 and not knows(_CONTIGUOUS, "alignment"):
            found.append(
                LeftOut(
                    "expert GEMMs at the smaller alignments that SGLang sets for each call on SM100 and SM120",
                    "the op sweeps DeepGEMM's default alignment only in this version of cachebuilder "
                    "(srt/layers/deep_gemm_wrapper/entrypoint.py, get_contiguous_layout_alignment)",
                )
            )
        if config.has("kv_lora_rank") and self.gpu.major == 9:
            found.append(
                LeftOut(
                    "m_grouped_fp8_gemm_nt_masked for the absorbed kv_b projection",
                    "only with SGLANG_USE_DEEPGEMM_BMM=1, which is off by default (srt/environ.py)",
                )
            )
        return found

    @property
    def moe_rule(self) -> str:
        """When the routed experts are DeepGEMM's: ``is_deepgemm_moe_runner_backend_enabled`` (quantization/fp8.py)."""
        if self.low_latency:
            return ""
        return (
            "SGLang's experts are DeepGEMM's with --moe-runner-backend deep_gemm, or with DeepEP "
            "(srt/layers/quantization/fp8.py). --moe-backend other leaves them out here."
        )
