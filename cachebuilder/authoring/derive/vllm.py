"""vLLM's rules: which GEMMs it sends to DeepGEMM, up to which M. Read in the wheels of 0.25.0, 0.32.0 and 0.33.0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.layers import Call, Experts, Linear, layers_text
from cachebuilder.authoring.derive.quantization import BLOCK, Checkpoint
from cachebuilder.authoring.derive.serving import IndexerLogits, Ranks, Serving
from cachebuilder.authoring.derive.switches import Known
from cachebuilder.errors import ModelError
from cachebuilder.ops.catalog import OPS, OpBase
from cachebuilder.ops.device import round_up

#: ``_DEEPGEMM_BLACKWELL_EXCLUDED_MODEL_TYPES`` (vllm/utils/deep_gemm.py): model_type → the major versions of the GPUs
#: on which vLLM switches DeepGEMM off, and since which release; for accuracy, for kolibri1 for latency.
_SWITCHED_OFF = {
    "qwen3_5_text": ((10, 12), "0.25.0"),
    "qwen3_5_moe_text": ((10, 12), "0.25.0"),
    "kolibri1": ((12,), "0.33.0"),
}

_CONTIGUOUS, _MASKED = "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"

#: Tokens in a KV-cache block, the unit of the chunked-context workspace; the MLA backends usually have 64.
_CACHE_BLOCK = 64


class Vllm(Serving):
    """``dp`` replicas of ``tp`` ranks each; ``ep`` is 1 or all of them (--enable-expert-parallel)."""

    name: ClassVar[str] = "vllm"
    versions: ClassVar[tuple[str, ...]] = ("0.25.0", "0.32.0", "0.33.0")
    header: ClassVar[tuple[str, ...]] = (
        "compiled_dims is left out: vLLM does not pass it, so DeepGEMM's own default holds. In the copy of vLLM's "
        "wheel (vllm/third_party/deep_gemm), N and K are compiled in. vLLM prefers an installed deep_gemm to that "
        "copy: plan with the one that serves.",
        "Linear layers: block-FP8 with N a multiple of 64 and K of 128 (vllm/utils/deep_gemm.py, "
        "should_use_deepgemm_for_fp8_linear). With FlashInfer, vLLM serves M < 32 on SM90 without DeepGEMM "
        "(kernels/linear/scaled_mm/flashinfer.py); this manifest covers those M as well.",
    )

    known: ClassVar[Known] = Known(
        {"--enable-dbo": ("overlap_batches", True), "VLLM_DBO_COMM_SMS": ("communicating_sms", None)},
        {"--enable-lora": "an adapter's layers are other ones, and the layers under them may not be fused"},
    )

    def check(self, config: Config) -> None:
        """Also: experts are spread over all tp · dp ranks, or not at all (config/parallel.py, 0.33.0)."""
        super().check(config)
        if self.ep not in (1, self.tp * self.dp):
            raise ModelError(
                f"vLLM's expert parallel size is tp · dp or 1: wanted --ep {self.tp * self.dp} or 1, found {self.ep}"
            )
        quantization = config.quantization
        if quantization.get("exclude_modules") and not quantization.get("ignore") and not self.at_least("0.33.0"):
            raise ModelError(
                f"{config.path}: quantization_config: wanted ignore, which vLLM {self.version} reads in a config.json, "
                "found exclude_modules alone: it would run those modules quantised"
            )
        kind = config.fields.get("model_type")
        majors, since = _SWITCHED_OFF.get(str(kind), ((), "0"))
        if self.gpu.major in majors and self.at_least(since):
            raise ModelError(
                f"{config.path}: vLLM {self.version} does not use DeepGEMM for {kind} on {self.gpu.name}: wanted an "
                "SM90 GPU (vllm/utils/deep_gemm.py, _DEEPGEMM_BLACKWELL_EXCLUDED_MODEL_TYPES)"
            )
        if self.low_latency and (self.ep == 1 or self.dp == 1):
            raise ModelError(
                "vLLM dispatches with low latency only between data-parallel ranks with expert parallelism: wanted "
                f"--dp and --ep above 1, found --dp {self.dp} --ep {self.ep}",
                hint="raise --dp and --ep, or leave --low-latency out (use_batched_dp_moe in vllm/config/parallel.py)",
            )

    @property
    def ranks(self) -> Ranks:
        """Tensor parallel ranks, with two exceptions.

        A shared expert is whole where the tokens are spread over the ranks instead: ``use_sequence_parallel_moe``
        (vllm/config/parallel.py, 0.33.0; 0.25.0 has the same condition). A routed expert is whole with expert
        parallelism, else divided among all tp · dp ranks: ``flatten_tp_across_dp_and_pcp``
        (vllm/model_executor/layers/fused_moe/config.py, 0.33.0).
        """
        spreads_tokens = self.ep > 1 and self.tp > 1 and self.dp > 1
        return Ranks(self.tp, 1 if spreads_tokens else self.tp, 1 if self.ep > 1 else self.tp * self.dp, self.tp)

    @property
    def sm_counts(self) -> tuple[int, ...]:
        """With dual-batch overlap, VLLM_DBO_COMM_SMS less while two halves of a batch run at once.

        ``create_sm_control_context`` (v1/worker/ubatch_utils.py, 0.33.0; v1/worker/gpu_ubatch_wrapper.py, 0.25.0).
        """
        all_sms = self.gpu.sm_count
        return (all_sms - self.switches.communicating_sms, all_sms) if self.switches.overlap_batches else ()

    @property
    def modelopt(self) -> tuple[str, ...]:
        """Since 0.32.0 also in mixed precision: 0.25.0's ``ModelOptMixedPrecisionConfig`` knows no blocks."""
        return ("FP8_PB_WO", "MIXED_PRECISION") if self.at_least("0.32.0") else ("FP8_PB_WO",)

    @property
    def largest_m(self) -> int:
        """``max_num_batched_tokens``."""
        return self.max_tokens

    def prefix_tokens(self, config: Config, sparse: bool) -> int | None:
        """Rows of the chunked-context workspace: one call of ``kv_b_proj`` may take all of them.

        ``determine_chunked_prefill_workspace_size`` (vllm/model_executor/layers/attention/mla_attention.py, 0.25.0 and
        0.33.0): min(max(8 · max_model_len, 4 · max_num_seqs · block_size), 64 Ki), at least a block for each sequence.
        vLLM's own warm-up of this layer ends at max_num_batched_tokens. Sparse attention reads the cache through the
        absorbed projection only.
        """
        if sparse:
            return None
        length = self.max_model_len or config.number("max_position_embeddings", 1 << 17)
        rows = min(max(8 * length, 4 * self.max_seqs * _CACHE_BLOCK), 64 * 1024)
        return max(rows, self.max_seqs * _CACHE_BLOCK, self.max_tokens)

    def keeps_unquantized(self, checkpoint: Checkpoint, weight: str, module: str) -> bool:
        """Entries are whole names, of a weight or of the fused layer, or patterns.

        ``is_layer_skipped`` (utils/quant_utils.py, 0.33.0; a fused name counts in 0.25.0, too). Of ModelOpt's entries,
        a part of the name is enough (``is_layer_excluded``, modelopt.py).
        """
        if {weight, module} & checkpoint.names or checkpoint.matches_pattern(weight):
            return True
        if checkpoint.method == "modelopt" and any(entry in weight for entry in checkpoint.unquantized):
            return True
        return "experts" in weight.rsplit(".", 1)[-1] and weight in checkpoint.of_experts

    def skips_block_check(self, checkpoint: Checkpoint, linear: Linear, rows: Sequence[int]) -> bool:
        """Of ``fp8`` checkpoints, layers that fuse several weights; of ModelOpt's, no division counts but K's.

        ``_maybe_allow_fp8_block_shape_mismatch`` (layers/linear.py, 0.25.0 to 0.33.0), which asks for the
        ``weight_block_size`` that only ``Fp8Config`` has. ModelOpt: ``ModelOptFp8PbWoLinearMethod`` (0.25.0) wants N of
        the whole layer a multiple of the block, ``_Fp8PbWoPartialBlock`` (0.32.0) pads it.
        """
        if checkpoint.method == "modelopt":
            return linear.split != "k" and (self.at_least("0.32.0") or sum(rows) % BLOCK == 0)
        return checkpoint.method == "fp8" and len(rows) > 1 and any(count % BLOCK for count in rows)

    def padded_rows(self, checkpoint: Checkpoint, n: int) -> int:
        """To whole blocks for ModelOpt's checkpoints since 0.32.0 (``_Fp8PbWoPartialBlock``, modelopt.py).

        Raises ModelError where 0.25.0 does not load such a layer (``ModelOptFp8PbWoLinearMethod``).
        """
        if checkpoint.method != "modelopt":
            return n
        if n % BLOCK and not self.at_least("0.32.0"):
            raise ModelError(
                f"vLLM {self.version} loads ModelOpt's whole blocks only: wanted N a multiple of {BLOCK}, found {n}"
            )
        return round_up(n, BLOCK)

    def padded_width(self, experts: Experts, width: int) -> int:
        """To whole blocks since 0.32.0, without expert parallelism, for ``--moe-backend deep_gemm``.

        ``pad_tp_shard_to_weight_blocks`` (fused_moe/oracle/fp8.py): the undivided sizes are multiples of the block.
        ``--moe-backend auto`` takes Triton with finer scales there.
        """
        if self.at_least("0.32.0") and self.ep == 1 and experts.intermediate % BLOCK == experts.hidden % BLOCK == 0:
            return round_up(width, BLOCK)
        return width

    def expert_ops(self, experts: Experts, count: int, n: int, k: int) -> list[tuple[OpBase, str]]:
        """Contiguous rows; with low-latency dispatch, a buffer for each expert.

        Contiguous: ``compute_aligned_M_and_alignment`` (fused_moe/deep_gemm_utils.py) with the tokens of all dp ranks.
        Masked: ``BatchedDeepGemmExperts`` (fused_moe/experts/batched_deep_gemm_moe.py), max_num_tokens · dispatchers
        rows for each expert; ``estimate_expected_m`` gives that number or any multiple of 16 below it.
        Both in 0.33.0; 0.25.0 has the same.
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
        if self.gpu.major != 9:
            fields["alignment"] = "per-call"
        layouts: list[dict[str, object]] = [fields]
        # Serving passes use_psum_layout (DeepGemmExperts.apply, fused_moe/experts/deep_gemm_moe.py), warm-up does not.
        if self.at_least("0.32.0") and self.gpu.major in (9, 10):
            layouts.append({**fields, "psum": True})
        return [(OPS[_CONTIGUOUS].model_validate({"op": _CONTIGUOUS, **layout}), how) for layout in layouts]

    def fuses_into_mega_moe(self, shared: int) -> bool:
        """Where each rank has whole shared experts: with one tensor parallel rank, or tokens spread over the ranks.

        ``_init_mega_moe_experts``, ``_use_sequence_parallel`` of models/deepseek_v4/nvidia/model.py, 0.33.0. Switched
        off by VLLM_DISABLE_DSV4_MEGAMOE_SHARED_EXPERT_FUSION=1, which these rules take to be unset.
        """
        return self.mega_moe and shared > 0 and (self.tp == 1 or self.pp == 1)

    def mega_moe_calls(self, experts: Experts, shared: int = 0, hashed: tuple[int, ...] = ()) -> list[Call]:
        """DeepSeek V4's layers: models/deepseek_v4/nvidia/model.py and fused_moe/deep_gemm_mega_moe.py, 0.33.0.

        The buffer has the size max_num_batched_tokens, the manifest's max_tokens. For up to 16 tokens (1 with 128
        experts) the router is a kernel outside DeepGEMM.
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
            raise ModelError(f"{what}: wanted {experts.count.how} a multiple of the {self.ep} ranks")
        calls = []
        if scored := [number for number in experts.layers if number not in hashed]:
            gate = f"mlp.gate, {layers_text(scored)}: experts chosen by score"
            calls.append(Call("bf16_mega_gate", experts.sizes, gate))
        if hashed:
            gate = f"mlp.gate, {layers_text(hashed)}: experts chosen by the token's hash"
            calls.append(Call("bf16_mega_gate", experts.sizes | {"bias": False, "hashed": True}, gate))
        layer: dict[str, object] = {"ranks": self.ep, **experts.sizes, "intermediate": experts.intermediate}
        if experts.clamp is not None:
            layer["activation_clamp"] = experts.clamp
        what = f"{experts.module}, {layers_text(experts.layers)}: {experts.count.how}, over ep {self.ep} ranks"
        if self.fuses_into_mega_moe(shared):
            layer["shared_experts"] = shared
            what += f", with n_shared_experts {shared}"
        calls.append(Call("fp8_fp4_mega_moe", layer, what))
        return calls

    def indexer_logits(self, v4: bool) -> IndexerLogits:
        """vllm/utils/deep_gemm.py, ``fp8_fp4_mqa_logits`` and its paged form.

        0.33.0 gives max_seqlen_k. On SM100 it gives MX scales (``mqa_logits_mx_inputs``), and decoding is varlen
        (``fp8_fp4_paged_mqa_logits``).
        """
        new = self.at_least("0.33.0")
        flat = new and self.gpu.major == 10
        formats: dict[str, object] = {"scales": "mx", "weights": "bfloat16", "logits": "bfloat16"} if flat else {}
        prefill = {"compressed": True, **formats} if new else formats
        batches = {1: self.max_seqs, 2: self.max_seqs}
        return IndexerLogits(("fp8_fp4_mqa_logits", prefill), ("fp8_fp4_paged_mqa_logits", formats), batches, flat)

    @property
    def moe_rule(self) -> str:
        """By ``select_fp8_moe_backend`` (fused_moe/oracle/fp8.py)."""
        preferred = {
            9: "Triton (tensor parallel) or FlashInfer's CUTLASS (expert parallel)",
            10: "FlashInfer's TRT-LLM",
        }
        backend = preferred.get(self.gpu.major)
        if backend is None or self.low_latency:
            return ""
        return (
            f"vLLM prefers {backend} for block-FP8 experts on this GPU. It runs them in DeepGEMM with --moe-backend "
            "deep_gemm or with VLLM_USE_DEEP_GEMM=1 (fused_moe/oracle/fp8.py). cachebuilder manifest leaves them out "
            "with --moe-backend other."
        )
