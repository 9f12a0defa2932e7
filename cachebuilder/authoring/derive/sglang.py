"""SGLang's rules: which GEMMs it sends to DeepGEMM, and up to which M. Read in the wheel of 0.5.23."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.layers import Call, Experts, LeftOut, Linear, layers_text
from cachebuilder.authoring.derive.quantization import BLOCK, Checkpoint
from cachebuilder.authoring.derive.serving import IndexerLogits, Ranks, Serving
from cachebuilder.authoring.derive.switches import Known
from cachebuilder.errors import ModelError
from cachebuilder.ops.catalog import OPS, OpBase
from cachebuilder.ops.device import round_up

_CONTIGUOUS, _MASKED = "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"

_MEGA_MOE = "--moe-backend deep_gemm_mega_moe"
#: How many tokens of one rank mega-MoE's buffer takes, and how many SMs it leaves free on SM100: the defaults of
#: SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK and …_RESERVED_SMS (srt/environ.py).
_MEGA_MOE_TOKENS, _MEGA_MOE_FREE_SMS = 8192, 2
#: Architectures whose MoE block calls mega-MoE, and whether steps beyond the buffer go to other kernels: ``forward`` of
#: ``DeepseekV2MoE`` (srt/models/deepseek_v2.py), ``_forward_mega_moe`` of srt/models/qwen3_moe.py and of qwen2_moe.py
#: (Qwen3-Next has that block); MEGA_MOE_NO_FALLBACK_ARCHS (srt/arg_groups/mega_moe_hook.py).
_MEGA_MOE_FALLS_BACK = {
    "DeepseekV3ForCausalLM": True,
    "DeepseekV32ForCausalLM": True,
    "GlmMoeDsaForCausalLM": True,
    "DeepseekV4ForCausalLM": False,
    "Qwen3MoeForCausalLM": False,
    "Qwen3NextForCausalLM": False,
}


#: Classes that ``--enforce-shared-experts-fusion`` lets fuse (``shared_experts_fusion_disable_reason`` of
#: srt/models/deepseek_v2.py).
_FUSES_ON_DEMAND = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")

#: Layers that SGLang makes without the checkpoint's quantisation: models/step3p5.py; models/qwen3_5_mtp.py and
#: exaone_moe_mtp.py (a plain ``nn.Linear``).
_NEVER_QUANTIZED = (".self_attn.g_proj", "mtp.fc")


class Sglang(Serving):
    """``tp`` ranks in all, divided into ``dp`` groups for attention (--enable-dp-attention).

    ``max_tokens`` is the chunked prefill size of the command line, before SGLang divides it by dp.
    """

    name: ClassVar[str] = "sglang"
    versions: ClassVar[tuple[str, ...]] = ("0.5.23",)
    header: ClassVar[tuple[str, ...]] = (
        "compiled_dims is left out: SGLang does not pass it, so sgl-deep-gemm's own default holds, which compiles "
        "no dimension into dense GEMMs (srt/layers/deep_gemm_wrapper/entrypoint.py).",
        "Linear layers: block-FP8 with N a multiple of 64 and K of 128 (srt/layers/quantization/fp8_utils.py, "
        "_deepgemm_block_fp8_supported). max_tokens is the end of SGLang's own list of M "
        "(srt/layers/deep_gemm_wrapper/compile_utils.py).",
    )

    known: ClassVar[Known] = Known(
        {
            "--moe-dense-tp-size": ("dense_tp", None),
            "--speculative-num-draft-tokens": ("draft_tokens", None),
            "--enforce-shared-experts-fusion": ("fuse_shared", True),
            "--disable-shared-experts-fusion": ("fuse_shared", False),
        },
        {
            "--enable-single-batch-overlap": "the experts' second GEMM signals its tokens, on fewer SMs "
            "(srt/batch_overlap/single_batch_overlap.py)",
            "--enable-two-batch-overlap": "DeepGEMM gets the SMs that DeepEP's own configuration leaves "
            "(srt/batch_overlap/operations_strategy.py)",
            "--enable-deepseek-v4-fp4-indexer": "the indexer's keys are FP4 (srt/layers/attention/dsv4/indexer.py)",
            "SGLANG_SHARED_EXPERT_TP1": "each rank has the whole shared expert of DeepSeek's models "
            "(srt/models/deepseek_v2.py)",
            "SGLANG_OPT_BF16_FP32_GEMM_ALGO": "BF16 layers reach DeepGEMM (srt/environ.py)",
            "SGLANG_USE_DEEPGEMM_BMM": "the absorbed kv_b projection reaches DeepGEMM (srt/environ.py)",
        },
    )

    def check(self, config: Config) -> None:
        """Also: dp and ep divide tp (srt/arg_groups/parallel_hook.py)."""
        super().check(config)
        for option, size in (("--dp", self.dp), ("--ep", self.ep)):
            if self.tp % size:
                raise ModelError(
                    f"SGLang divides its {self.tp} tensor parallel ranks: wanted {option} to divide --tp, found {size}"
                )
        if self.low_latency and self.ep == 1:
            raise ModelError("DeepEP dispatches between expert parallel ranks: wanted --ep above 1, found 1")
        dense = self.switches.dense_tp
        if dense not in (None, 1, self.tp):
            raise ModelError(f"--moe-dense-tp-size: SGLang wants 1 or --tp {self.tp}, found {dense}")
        if self.switches.fuse_shared and (self.ep > 1 or self.low_latency):
            raise ModelError(
                "--enforce-shared-experts-fusion: these rules cover it without expert parallelism only: wanted --ep 1, "
                f"found {self.ep}"
            )
        if self.mega_moe:
            self._check_mega_moe(config)

    def _check_mega_moe(self, config: Config) -> None:
        """``check_mega_moe_compat``, ``validate_mega_moe_token_budget`` (srt/arg_groups/mega_moe_hook.py) and
        ``_a2a_ep_size`` (srt/arg_groups/overrides.py).
        """
        if self.gpu.major not in (9, 10):
            raise ModelError(f"{_MEGA_MOE}: wanted an SM90 or SM100 GPU, found {self.gpu.name} ({self.gpu.capability})")
        falls_back = _MEGA_MOE_FALLS_BACK.get(_architecture(config))
        if falls_back is None:
            raise ModelError(
                f"{config.path}: {_MEGA_MOE}: wanted one of {', '.join(_MEGA_MOE_FALLS_BACK)}, found "
                f"{config.architecture}, whose MoE block does not call mega-MoE in SGLang {self.versions[-1]}",
                hint="leave --moe-backend out, or record the engine (cachebuilder record)",
            )
        if self.low_latency:
            raise ModelError(
                f"{_MEGA_MOE}: SGLang takes one all-to-all backend: wanted no --low-latency (DeepEP's), found both"
            )
        if self.tp == 1:  # SGLang would run it, and fuse some models' shared experts into the routed ones
            raise ModelError(f"{_MEGA_MOE}: these rules cover it between ranks only: wanted --tp above 1, found 1")
        if self.ep != self.tp:
            raise ModelError(
                f"{_MEGA_MOE}: SGLang spreads the experts over all ranks: wanted --ep {self.tp}, found {self.ep}"
            )
        if not falls_back and self._mega_moe_rows > _MEGA_MOE_TOKENS:
            raise ModelError(
                f"{_MEGA_MOE}: wanted at most {_MEGA_MOE_TOKENS} tokens a rank, found {self._mega_moe_rows} "
                "(--max-num-batched-tokens / --dp): SGLang does not start",
                hint="lower --max-num-batched-tokens; if you raise "
                "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK, set max_tokens of the mega-MoE ops to its value",
            )

    @property
    def _mega_moe_rows(self) -> int:
        """How many tokens a prefill may bring to one rank, as SGLang counts them."""
        return round_up(self.max_tokens // self.dp, self.ranks.attention)

    @property
    def ranks(self) -> Ranks:
        """Attention: ``attn_tp``, tp / dp; routed experts: ``moe_tp``, tp / ep; a shared expert: all, or 1.

        Each rank has the whole shared expert under DeepEP (models/deepseek_v2.py, glm4_moe.py) and mega-MoE
        (models/deepseek_v2.py, qwen2_moe.py).
        """
        shared = 1 if self.low_latency or self.mega_moe else self.tp
        return Ranks(self.tp // self.dp, shared, self.tp // self.ep, self.switches.dense_tp or self.tp)

    @property
    def modelopt(self) -> tuple[str, ...]:
        """Mixed precision only (srt/layers/quantization/modelopt_quant.py)."""
        return ("MIXED_PRECISION",)

    @property
    def largest_m(self) -> int:
        """The end of the list of M that SGLang's own pre-compilation goes through.

        ``update_deep_gemm_config`` (srt/layers/deep_gemm_wrapper/compile_utils.py): 16 Ki; twice the chunked prefill
        size where that is above 8192; at most 128 Ki. ``_handle_data_parallelism`` (srt/arg_groups/parallel_hook.py)
        has divided that size by dp, but layers that all ranks share get the tokens of all dp groups.
        """
        chunk = self.max_tokens // self.dp
        return max(min(2 * chunk if chunk > 8192 else 16 * 1024, 128 * 1024), self.max_tokens)

    def prefix_tokens(self, config: Config, sparse: bool) -> int:
        """SGLANG_MAX_KV_CHUNK_CAPACITY (srt/environ.py): the most tokens of the cache that are projected at once.

        With the batch's own, or in chunks: srt/models/deepseek_common/attention_forward_methods/forward_mha.py.
        V3.2 also takes this path while its sequences are short (srt/layers/attention/dsa_backend.py).
        """
        return max(128 * 1024, self.largest_m)

    def fuses_shared_experts(self, config: Config, shared: int) -> bool:
        """By ``shared_experts_fusion_disable_reason`` (models/deepseek_v2.py, models/glm4_moe.py) or
        ``can_fuse_shared_expert`` (models/qwen2_moe.py, called by models/qwen3_next.py).

        Without expert parallelism: DeepSeek V3 and GLM-5 with 256 experts and one shared, and GLM-4.5 to 4.7. With and
        without it: Qwen3-Next, where the shared expert is as wide as a routed one.
        """
        if self.low_latency or self.mega_moe or not self.moe_deep_gemm or self.switches.fuse_shared is False:
            return False
        if self.switches.fuse_shared and config.architecture in _FUSES_ON_DEMAND:
            return shared > 0
        if config.architecture == "Qwen3NextForCausalLM":
            width = config.number("shared_expert_intermediate_size", 0, least=0)
            return width == config.number("moe_intermediate_size")
        if self.ep > 1:
            return False
        if config.architecture == "Glm4MoeForCausalLM":
            return shared > 0
        return (
            config.architecture in ("DeepseekV3ForCausalLM", "GlmMoeDsaForCausalLM")
            and shared == 1
            and config.number("n_routed_experts") == 256
        )

    def keeps_unquantized(self, checkpoint: Checkpoint, weight: str, module: str) -> bool:
        """Entries match components of a dotted name (``_module_path_match``, srt/layers/quantization/utils.py).

        A fused name counts in compressed-tensors only (``should_ignore_layer``). `_NEVER_QUANTIZED` need no entry.
        """
        if weight.endswith(_NEVER_QUANTIZED) or checkpoint.matches_pattern(weight):
            return True
        if checkpoint.method == "compressed-tensors":
            return bool({weight, module} & checkpoint.names)
        return checkpoint.names_component(weight) or (
            "experts" in weight.rsplit(".", 1)[-1] and weight in checkpoint.of_experts
        )

    def skips_block_check(self, checkpoint: Checkpoint, linear: Linear, rows: Sequence[int]) -> bool:
        """MiMo-V2's ``skip_block_quant_check``; a fused ``ReplicatedLinear``, which is one weight to SGLang."""
        return linear.split == "none" or (checkpoint.method == "fp8" and not linear.checked)

    def expert_ops(self, experts: Experts, count: int, n: int, k: int) -> list[tuple[OpBase, str]]:
        """Both layouts: srt/layers/moe/moe_runner/deep_gemm.py chooses masked or compact rows by the free memory.

        Under DeepEP, prefill is contiguous and decoding masked. expected_m is always about tokens · top-k / experts,
        less than a batch of tokens; SGLang's pre-compilation sweeps it as far as M.
        """
        rows = self.largest_m
        weights = {"experts": count, "n": n, "k": k}
        contiguous: dict[str, object] = {"op": _CONTIGUOUS, **weights, "topk": experts.topk}
        if self.gpu.major != 9:
            contiguous["alignment"] = "per-call"
        masked = {"op": _MASKED, **weights, "max_m": rows}
        return [
            (OPS[_CONTIGUOUS].model_validate(contiguous), ""),
            (OPS[_MASKED].model_validate(masked), f"expected_m up to {rows}, the end of SGLang's own list"),
        ]

    def fuses_into_mega_moe(self, shared: int) -> bool:
        """FP8 shared experts beside MXFP4 routed ones, on SM100.

        ``should_fuse_mega_moe_shared_experts`` (srt/layers/moe/mega_moe.py), which only models/deepseek_v4.py calls.
        Switched off by SGLANG_OPT_DEEPGEMM_MEGA_MOE_FUSE_SHARED_EXPERTS=0, which these rules take to be unset.
        """
        return self.mega_moe and shared > 0 and self.gpu.major == 10

    def mega_moe_calls(self, experts: Experts, shared: int = 0, hashed: tuple[int, ...] = ()) -> list[Call]:
        """SM90: FP8 experts; SM100: MXFP4 experts. srt/layers/moe/mega_moe.py and mega_moe_sm90.py.

        SGLang prepares no other experts for mega-MoE (``is_mega_moe_experts_ready``, quantization/fp8.py). On SM100 the
        pre-dispatch is a kernel of SGLang's own (``sglang.kernels.ops.moe.dsv4``). The router is not DeepGEMM's for any
        model of these rules (``mega_gate_supported``, srt/layers/moe/mega_gate.py). The weights' scales are brought
        into DeepGEMM's layout at load.
        """
        fp4 = self.gpu.major == 10
        if experts.mxfp4 != fp4:
            raise ModelError(
                f"{_MEGA_MOE}: wanted experts in {'MXFP4' if fp4 else 'FP8'}, which SGLang {self.version} runs this "
                f"way on {self.gpu.name}, found experts in {'MXFP4' if experts.mxfp4 else 'FP8'}",
                hint="leave --moe-backend out, or name another GPU",
            )
        if experts.count % self.ep:
            raise ModelError(f"{_MEGA_MOE}: wanted {experts.count.how} a multiple of the {self.ep} ranks")
        layer: dict[str, object] = {"ranks": self.ep, **experts.sizes, "intermediate": experts.intermediate}
        layer["max_tokens"] = _MEGA_MOE_TOKENS
        clamp: dict[str, object] = {} if experts.clamp is None else {"activation_clamp": experts.clamp}
        what = f"{experts.module}, {layers_text(experts.layers)}: {experts.count.how}, over ep {self.ep} ranks"
        if not fp4:
            return [
                Call("mega_moe_pre_dispatch_sm90", layer, f"{what}; tokens into the buffer"),
                Call("fp8_mega_moe", layer | clamp, what),
            ]
        if experts.hidden % 512:
            raise ModelError(
                f"{_MEGA_MOE}: wanted hidden_size a multiple of 512, found {experts.hidden} (check_mega_moe_shapes, "
                "srt/layers/moe/mega_moe.py)"
            )
        sms = self.gpu.sm_count - _MEGA_MOE_FREE_SMS
        layer |= clamp | {"sm_counts": [sms - sms % 2]}  # _configure_mega_moe_deep_gemm_num_sms
        if shared:
            layer["shared_experts"] = shared
            what += f", with n_shared_experts {shared}"
        what += f"; SMs: {self.gpu.sm_count} - {_MEGA_MOE_FREE_SMS}, rounded down to an even number"
        return [
            Call("fp8_fp4_mega_moe", layer, what),
            *_scales_at_load(experts, experts.count // self.ep, shared * experts.intermediate),
        ]

    def projects_indexer_keys(self, config: Config) -> bool:
        """True unless rotary embedding is interleaved: then ``wk`` is fused with the weights' projection.

        ``use_dsa_indexer_fusion`` of srt/layers/attention/dsa/dsa_indexer.py; ``indexer_rope_interleave`` in
        srt/models/deepseek_v2.py.
        """
        return config.fields.get("indexer_rope_interleave") is not True

    def indexer_beside(self) -> tuple[int, int] | None:
        """In CUDA graphs of up to DUAL_STREAM_TOKEN_THRESHOLD tokens, beside the keys, on half of the SMs.

        Half is rounded up to a multiple of 8: ``_get_q_k_bf16``, ``half_device_sm_count`` of
        srt/layers/attention/dsa/dsa_indexer.py.
        """
        return 1024, round_up(self.gpu.sm_count // 2, 8)

    def indexer_logits(self, v4: bool) -> IndexerLogits:
        """srt/layers/attention/dsa/dsa_indexer.py: the FP8 functions, whose logits are at their own columns.

        V3.2: with speculation a request has 4 rows (``_auto_choose_speculative_params``, speculative_hook.py in
        srt/arg_groups), or ``--speculative-num-draft-tokens``. On SM90 they are so many sequences; on SM100 they are so
        while they are drafted, but not while they are verified (srt/layers/attention/dsa_backend.py). With pipeline
        parallelism, all ranks but the last leave an SM to receiving while they compute a prefill's logits
        (``_with_real_sm_count``).

        V4: compressed logits, with as many columns as the longest sequence has keys
        (srt/layers/attention/dsv4/indexer.py).
        """
        batches = {1: self.max_seqs, 2: self.max_seqs}
        prefill: dict[str, object] = {}
        if v4:
            prefill["compressed"] = True
        else:
            rows = self.switches.draft_tokens or 4
            drafted = {1: rows * self.max_seqs}
            batches = drafted if self.gpu.major == 9 else batches | drafted | {rows: self.max_seqs}
            if self.pp > 1:
                prefill["sm_counts"] = [self.gpu.sm_count - 1, self.gpu.sm_count]
        return IndexerLogits(("fp8_mqa_logits", prefill), ("fp8_paged_mqa_logits", {}), batches)

    def left_out(self, config: Config) -> list[LeftOut]:
        """On SM90, an optional form of ``kv_b_proj``; with mega-MoE, steps beyond its buffer."""
        left_out = []
        if config.has("kv_lora_rank") and self.gpu.major == 9:
            what = "m_grouped_fp8_gemm_nt_masked for the absorbed kv_b projection"
            why = "SGLang calls it only with SGLANG_USE_DEEPGEMM_BMM=1, which is off by default (srt/environ.py)"
            left_out.append(LeftOut(what, why))
        if self.mega_moe and self._mega_moe_rows > _MEGA_MOE_TOKENS:
            left_out.append(
                LeftOut(
                    f"experts in steps of more than {_MEGA_MOE_TOKENS} tokens a rank, the size of mega-MoE's buffer",
                    "they go to the kernels of --moe-runner-backend, by default Triton's "
                    "(should_use_mega_moe in srt/layers/moe/mega_moe.py, forward_normal in srt/models/deepseek_v2.py)",
                )
            )
        return left_out

    @property
    def moe_rule(self) -> str:
        """By ``is_deepgemm_moe_runner_backend_enabled`` (quantization/fp8.py)."""
        if self.low_latency:
            return ""
        if self.mega_moe:
            rule = (
                "SGLang runs experts in mega-MoE with --moe-a2a-backend megamoe (srt/arg_groups/mega_moe_hook.py). Its "
                f"buffer holds {_MEGA_MOE_TOKENS} tokens a rank, the default of "
                "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK; for another, change max_tokens of these ops."
            )
            if self.gpu.major == 10:
                rule += (
                    f" It leaves {_MEGA_MOE_FREE_SMS} SMs free and runs shared experts in the kernel: also defaults "
                    "(…_RESERVED_SMS, …_FUSE_SHARED_EXPERTS, srt/environ.py). --enable-w4a4-mxfp4-megamoe calls other "
                    "kernels."
                )
            return rule
        return (
            "SGLang runs experts in DeepGEMM with --moe-runner-backend deep_gemm, or with DeepEP "
            "(srt/layers/quantization/fp8.py). cachebuilder manifest leaves them out with --moe-backend other."
        )


def _architecture(config: Config) -> str:
    """The model's class. DeepSeek V4's checkpoints are known by their model_type, as in `families.describe`."""
    return "DeepseekV4ForCausalLM" if config.fields.get("model_type") == "deepseek_v4" else config.architecture


def _scales_at_load(experts: Experts, local: int, shared: int) -> list[Call]:
    """Scales of a mega-MoE layer's weights on SM100, brought into DeepGEMM's layout when they are loaded.

    ``build_mega_moe_experts_weights`` and ``_transform_mega_moe_shared_sf`` (srt/layers/moe/mega_moe.py). A shared
    expert is first prepared as a linear layer (``transform_scale_ue8m0``, srt/layers/quantization/fp8_utils.py).

    Args:
        local: how many routed experts a rank has.
        shared: the shared experts' width; 0: they are not in the kernel.
    """
    transform, pack = "transform_sf_into_required_layout", "get_mn_major_tma_aligned_packed_ue8m0_tensor"
    inner: int = experts.intermediate
    hidden: int = experts.hidden
    calls = []
    for name, rows, k in (("w13", 2 * inner, hidden), ("w2", hidden, inner)):
        fields = {"k": k, "recipe": [1, 32], "groups": local, "rows": rows}
        calls.append(Call(transform, fields, f"scales of {experts.module} {name} at load"))
    for name, rows, k in (("gate_up_proj", 2 * shared, hidden), ("down_proj", hidden, shared)) if shared else ():
        what = f"scales of mlp.shared_experts.{name} at load"
        calls.append(Call(pack, {"columns": k // BLOCK, "rows": rows}, what))
        calls.append(Call(transform, {"k": k, "recipe": [BLOCK, 32], "rows": rows}, what))
    return calls
