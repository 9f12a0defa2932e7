"""vLLM's rules: what it sends to DeepGEMM, over which M. Read in the wheels of 0.25.0, 0.32.0 and 0.33.0."""

from __future__ import annotations

from typing import ClassVar

from cachebuilder.authoring.derive.config import Config, path_match, pattern_match
from cachebuilder.authoring.derive.layers import Call, Experts, LeftOut, numbers_text
from cachebuilder.authoring.derive.serving import Serving, indexer_calls, knows
from cachebuilder.errors import ModelError
from cachebuilder.ops.catalog import OPS, OpBase

#: ``_DEEPGEMM_BLACKWELL_EXCLUDED_MODEL_TYPES`` (vllm/utils/deep_gemm.py, 0.25.0 and 0.33.0): switched off for accuracy.
_NOT_ON_BLACKWELL = ("qwen3_5_text", "qwen3_5_moe_text")

_CONTIGUOUS, _MASKED = "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"

#: Tokens in a KV-cache block, which the chunked-context workspace counts in; 64 is the MLA backends' usual one.
_CACHE_BLOCK = 64


def _layers(numbers: tuple[int, ...]) -> str:
    return f"layers {numbers_text(numbers)}"


class Vllm(Serving):
    """``dp`` replicas of ``tp`` ranks each; ``ep`` is 1 or all of them (--enable-expert-parallel)."""

    name: ClassVar[str] = "vllm"
    versions: ClassVar[tuple[str, ...]] = ("0.25.0", "0.32.0", "0.33.0")

    def check(self, config: Config) -> None:
        """As the base says; besides, experts are spread over tp · dp ranks or none (config/parallel.py, 0.33.0)."""
        super().check(config)
        if self.ep not in (1, self.tp * self.dp):
            raise ModelError(
                f"vLLM's expert parallel size is tp · dp or 1: wanted --ep {self.tp * self.dp} or 1, found {self.ep}"
            )
        kind = config.fields.get("model_type")
        if self.gpu.major != 9 and kind in _NOT_ON_BLACKWELL:
            raise ModelError(
                f"{config.path}: vLLM {self.version} does not use DeepGEMM for {kind} on {self.gpu.name}: wanted an "
                "SM90 GPU (vllm/utils/deep_gemm.py, _DEEPGEMM_BLACKWELL_EXCLUDED_MODEL_TYPES)"
            )
        if self.low_latency and (self.ep == 1 or self.dp == 1):
            raise ModelError(
                "vLLM dispatches with low latency only between data-parallel ranks with expert parallelism: wanted "
                f"--dp and --ep above 1, found --dp {self.dp} --ep {self.ep}",
                hint="use_batched_dp_moe in vllm/config/parallel.py, 0.33.0",
            )

    @property
    def attention_ranks(self) -> int:
        """Tensor parallel ranks."""
        return self.tp

    @property
    def shared_ranks(self) -> int:
        """Tensor parallel ranks; 1 where tokens are spread over them instead: ``use_sequence_parallel_moe``.

        vllm/config/parallel.py, 0.33.0; 0.25.0 has the same condition.
        """
        return 1 if self.ep > 1 and self.tp > 1 and self.dp > 1 else self.tp

    @property
    def expert_ranks(self) -> int:
        """1 with expert parallelism, else all tp · dp ranks: ``flatten_tp_across_dp_and_pcp``.

        vllm/model_executor/layers/fused_moe/config.py, 0.33.0.
        """
        return 1 if self.ep > 1 else self.tp * self.dp

    @property
    def largest_m(self) -> int:
        """``max_num_batched_tokens``."""
        return self.max_tokens

    def prefix_tokens(self, config: Config) -> int | None:
        """Rows of the chunked-context workspace, all of which ``kv_b_proj`` may be called for.

        ``determine_chunked_prefill_workspace_size`` (vllm/model_executor/layers/attention/mla_attention.py, 0.25.0 and
        0.33.0): min(max(8 · max_model_len, 4 · max_num_seqs · block_size), 64 Ki), at least a block for each sequence.
        No warm-up of vLLM's reaches beyond max_num_batched_tokens here. Sparse attention reads the cache through the
        absorbed projection only.
        """
        if config.has("index_topk"):
            return None
        length = self.max_model_len or config.number("max_position_embeddings", 1 << 17)
        rows = min(max(8 * length, 4 * self.max_seqs * _CACHE_BLOCK), 64 * 1024)
        return max(rows, self.max_seqs * _CACHE_BLOCK, self.max_tokens)

    def keeps_unquantized(self, config: Config, module: str) -> bool:
        """Whole names match (``is_layer_skipped``, utils/quant_utils.py, 0.33.0), and compressed-tensors patterns."""
        tail = module.split("layers.", 1)[-1]
        return any(
            (entry.split("layers.", 1)[-1] == tail if "layers." in entry else entry == module)
            or pattern_match(entry, module)
            or ("experts" in tail and path_match(tail, entry))
            for entry in config.unconverted
        )

    def expert_ops(self, experts: Experts, count: int, n: int, k: int) -> list[tuple[OpBase, str]]:
        """Contiguous rows, or with low-latency dispatch a buffer for each expert.

        Contiguous: ``compute_aligned_M_and_alignment`` (fused_moe/deep_gemm_utils.py) with the tokens of all dp ranks.
        Masked: ``BatchedDeepGemmExperts`` (fused_moe/experts/batched_deep_gemm_moe.py), max_num_tokens · dispatchers
        rows for each expert; ``estimate_expected_m`` gives any multiple of 16 up to that, or that.
        0.33.0; 0.25.0 the same.
        """
        if self.low_latency:
            rows = self.max_tokens * self.ep
            how = f"rows for each expert: max_num_batched_tokens {self.max_tokens} · {self.ep} dispatching ranks"
            masked = {"op": _MASKED, "experts": count, "max_m": rows, "n": n, "k": k}
            return [(OPS[_MASKED].model_validate(masked), how)]
        tokens = self.dp * self.max_tokens
        fields: dict[str, object] = {"experts": count, "topk": experts.topk, "n": n, "k": k}
        how = ""
        if self.dp > 1:
            fields["max_tokens"] = tokens
            how = f"tokens of all ranks: dp {self.dp} · max_num_batched_tokens {self.max_tokens} = {tokens}"
        if self.gpu.major != 9 and knows(_CONTIGUOUS, "alignment"):
            fields["alignment"] = "per-call"
        layouts: list[dict[str, object]] = [fields]
        if self._psum and knows(_CONTIGUOUS, "psum"):  # as serving calls it; the other is the warm-up's
            layouts.append({**fields, "psum": True})
        return [(OPS[_CONTIGUOUS].model_validate({"op": _CONTIGUOUS, **layout}), how) for layout in layouts]

    @property
    def _psum(self) -> bool:
        """Whether ``DeepGemmExperts.apply`` passes use_psum_layout (fused_moe/experts/deep_gemm_moe.py)."""
        return self.at_least("0.32.0") and self.gpu.major in (9, 10)

    def fuses_into_mega_moe(self, shared: int) -> bool:
        """Where each rank has whole shared experts: with one tensor-parallel rank, or tokens spread over the ranks.

        ``_init_mega_moe_experts``, ``_use_sequence_parallel`` of models/deepseek_v4/nvidia/model.py, 0.33.0; not with
        VLLM_DISABLE_DSV4_MEGAMOE_SHARED_EXPERT_FUSION=1.
        """
        return self.mega_moe and shared > 0 and (self.tp == 1 or self.pp == 1)

    def mega_moe_calls(self, experts: Experts, shared: int = 0, hashed: tuple[int, ...] = ()) -> list[Call]:
        """DeepSeek V4's: models/deepseek_v4/nvidia/model.py and fused_moe/deep_gemm_mega_moe.py, 0.33.0.

        The buffer is sized for max_num_batched_tokens, the manifest's max_tokens. Up to 16 tokens (1 for 128 experts)
        the router is not DeepGEMM's.
        """
        what = "--moe-backend deep_gemm_mega_moe"
        if not experts.mxfp4:
            raise ModelError(
                f"{what}: wanted DeepSeek V4 with experts in MXFP4, found experts in FP8",
                hint="record the engine (cachebuilder record), or write the ops by hand: docs/entry-points.md",
            )
        if not self.at_least("0.33.0") or self.gpu.major != 10:
            raise ModelError(f"{what}: wanted vLLM 0.33.0 on an SM100 GPU, found {self.version} on {self.gpu.name}")
        if self.ep != self.tp * self.dp:
            raise ModelError(f"{what}: wanted expert parallelism, --ep {self.tp * self.dp} (tp · dp), found {self.ep}")
        if experts.count % self.ep:
            raise ModelError(f"{what}: wanted {experts.how} a multiple of the {self.ep} ranks")
        sizes: dict[str, object] = {"experts": experts.count, "topk": experts.topk, "hidden": experts.hidden}
        calls = []
        given: dict[str, object] = {"bias": False, "hashed": True}
        for layers, fields, how in (
            (tuple(number for number in experts.layers if number not in hashed), {}, "chosen by score"),
            (hashed, given, "given by the token's hash"),
        ):
            if layers:
                calls.append(Call("bf16_mega_gate", sizes | fields, f"mlp.gate, {_layers(layers)}: experts {how}"))
        layer: dict[str, object] = {"ranks": self.ep, **sizes, "intermediate": experts.intermediate}
        if experts.clamp is not None:
            layer["activation_clamp"] = experts.clamp
        fused = self.fuses_into_mega_moe(shared)
        if fused:
            layer["shared_experts"] = shared
        kept = f", with n_shared_experts {shared}" if fused else ""
        what = f"mlp.experts, {_layers(experts.layers)}: {experts.how}, over ep {self.ep} ranks{kept}"
        calls.append(Call("fp8_fp4_mega_moe", layer, what))
        return calls

    def indexer_calls(self, heads: int, what: str, v4: bool) -> list[Call]:
        """vllm/utils/deep_gemm.py: ``fp8_fp4_mqa_logits`` and its paged form; 0.33.0 gives max_seqlen_k, and MX scales
        on SM100 (``mqa_logits_mx_inputs``), where decoding is varlen (``fp8_fp4_paged_mqa_logits``).
        """
        formats: dict[str, object] = {}
        flat = self.at_least("0.33.0") and self.gpu.major == 10
        if self.at_least("0.33.0"):
            formats["compressed"] = True
            if flat:
                formats |= {"scales": "mx", "weights": "bfloat16", "logits": "bfloat16"}
        batches = {1: self.max_seqs, 2: self.max_seqs}
        return indexer_calls("fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", heads, formats, batches, what, flat)

    def header(self, config: Config) -> list[str]:
        """As the base says."""
        return [
            "compiled_dims is left out: vLLM passes none, so DeepGEMM's own default holds, N and K compiled in for the "
            "copy in vLLM's wheel (vllm/third_party/deep_gemm). vLLM takes an installed deep_gemm first: plan with "
            "the copy that serves.",
            "Linear layers: block-FP8 with N a multiple of 64 and K of 128 (vllm/utils/deep_gemm.py, "
            "should_use_deepgemm_for_fp8_linear). With FlashInfer, vLLM serves M < 32 on SM90 without DeepGEMM "
            "(kernels/linear/scaled_mm/flashinfer.py); those M are swept all the same.",
        ]

    def left_out(self, config: Config, has_experts: bool) -> list[LeftOut]:
        """As the base says."""
        found = []
        if (
            has_experts
            and self.moe_deep_gemm
            and not self.low_latency
            and self._psum
            and not knows(_CONTIGUOUS, "psum")
        ):
            found.append(
                LeftOut(
                    "m_grouped_fp8_gemm_nt_contiguous with use_psum_layout=True, as serving calls it on SM90 and SM100",
                    "the op has no such field in this version of cachebuilder: what is swept is the layout that vLLM's "
                    "own warm-up calls (fused_moe/experts/deep_gemm_moe.py, warmup/deep_gemm_warmup.py)",
                )
            )
        if (
            has_experts
            and self.moe_deep_gemm
            and not self.low_latency
            and self.gpu.major != 9
            and not knows(_CONTIGUOUS, "alignment")
        ):
            found.append(
                LeftOut(
                    "expert GEMMs at the smaller alignments that vLLM sets for each call on SM100 and SM120",
                    "the op sweeps DeepGEMM's default alignment only in this version of cachebuilder "
                    "(fused_moe/deep_gemm_utils.py, compute_aligned_M_and_alignment)",
                )
            )
        return found

    @property
    def moe_rule(self) -> str:
        """When the routed experts are DeepGEMM's: ``select_fp8_moe_backend`` (fused_moe/oracle/fp8.py)."""
        first = {9: "Triton (tensor parallel) or FlashInfer's CUTLASS (expert parallel)", 10: "FlashInfer's TRT-LLM"}
        other = first.get(self.gpu.major)
        if other is None or self.low_latency:
            return ""
        return (
            f"vLLM prefers {other} for block-FP8 experts on this GPU; they are DeepGEMM's with --moe-backend deep_gemm "
            "or with VLLM_USE_DEEP_GEMM=1 set (fused_moe/oracle/fp8.py). --moe-backend other leaves them out here."
        )
