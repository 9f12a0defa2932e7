"""What is done in SGLang's processes so that they run on a virtual GPU, and what its configuration says (0.5.23)."""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any

from _cachebuilder_calls import note, note_weights  # type: ignore[import-not-found]
from _cachebuilder_compilers import Nothing  # type: ignore[import-not-found]

#: Stages of pipeline parallelism, whose layers one process has.
STAGES = int(os.environ.get("CACHEBUILDER_OBSERVE_STAGES", 1))


def note_settings(module: ModuleType) -> None:
    """Write down what SGLang's scheduler works with (``srt/managers/scheduler.py``).

    The tokens of all groups of data parallel attention come together before the experts. Pipeline stages may choose
    larger chunks than were asked for (``max_prefill_buffer_tokens`` in ``srt/arg_groups/overrides.py``). V3.2's indexer
    takes each token of a draft for a sequence (``srt/layers/attention/dsa_backend.py``).
    """
    init = module.Scheduler.__init__

    def init_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        groups = module.get_parallel().attn_dp_size
        tokens = self.chunked_prefill_size or self.max_prefill_tokens
        if STAGES > 1 and module.get_schedule().enable_dynamic_chunking:
            tokens = max(tokens, self.max_prefill_tokens or 0, math.ceil(tokens * 1.25))
        drafts = module.get_spec().speculative_num_draft_tokens or 1
        note(
            {
                "max_num_batched_tokens": groups * tokens,
                "max_num_seqs": self.max_running_requests * drafts,
                "max_model_len": self.model_config.context_len,
            }
        )

    module.Scheduler.__init__ = init_and_note


def note_loaded_weights(module: ModuleType) -> None:
    """Write down the quantised modules of each model that SGLang loads (``model_runner.py``)."""
    load = module.ModelRunner.load_model

    def load_and_note(self: Any) -> None:
        load(self)
        note_weights(self.model)

    module.ModelRunner.load_model = load_and_note


def note_context_chunk(module: ModuleType) -> None:
    """Write down how many cached tokens SGLang's MLA takes up at once, when it asks for that.

    ``srt/model_executor/forward_batch_deepseek_mha_mixin.py``.
    """
    mixin = module.ForwardBatchDeepSeekMHAMixin
    capacity = mixin.get_max_chunk_capacity

    def ask_and_note(self: Any) -> int:
        tokens = int(capacity(self))
        note({"context_chunk": tokens})
        return tokens

    mixin.get_max_chunk_capacity = ask_and_note


def default_scales_of_keys(module: ModuleType) -> None:
    """Give the KV cache the scales that SGLang gives it where a checkpoint has none (``kv_cache.py``).

    SGLang compares the scales on the device, whose answers mean nothing here.
    """

    def set_defaults(self: Any, layer: Any) -> None:
        for name in ("k_scale", "v_scale"):
            getattr(layer, name).fill_(1.0)
            setattr(layer, f"{name}_float", 1.0)

    module.BaseKVCacheMethod.process_weights_after_loading = set_defaults


def both_layouts(module: ModuleType) -> None:
    """Take the masked layout of experts for small steps and the contiguous one for large ones.

    SGLang takes the masked one while it fits into a share of the memory that is free on the card at its start
    (``layers/moe/moe_runner/deep_gemm.py``). A virtual GPU cannot know that share, so both are seen, and each is swept
    for every M.
    """

    def estimate(runner_config: Any, quant_info: Any, hidden_states: Any) -> int:
        return 0 if hidden_states.shape[0] <= 1024 else 1 << 60

    module._estimate_masked_standard_layout_peak_bytes = estimate  # type: ignore[attr-defined]


def one_token_a_draft(module: ModuleType) -> None:
    """Take one token of each draft, as if the model had refused the draft's own (``srt/speculative/eagle_utils.py``).

    SGLang reads back from the device how many it took; a number without meaning, of which zero would never end.
    """
    sample = module.eagle_sample

    def sample_one(*args: Any, **kwargs: Any) -> Any:
        import torch

        predicted, lengths, indices = sample(*args, **kwargs)
        ones = torch.ones(lengths.shape, dtype=lengths.dtype, device="cpu")
        return predicted, ones.to(lengths.device), indices

    module.eagle_sample = sample_one  # type: ignore[attr-defined]


def fork_processes(module: ModuleType) -> None:
    """Fork SGLang's processes, which it would spawn: each would import torch and all of SGLang again.

    ``srt/entrypoints/engine.py``. torch refuses a GPU that was used before the fork; the virtual one can be forked.
    """
    settle = module._set_envs_and_config

    def settle_and_fork(*args: Any, **kwargs: Any) -> None:
        import torch

        settle(*args, **kwargs)
        module.mp.set_start_method("fork", force=True)
        torch.cuda._is_in_bad_fork = lambda: False

    module._set_envs_and_config = settle_and_fork  # type: ignore[attr-defined]


def one_scheduler(module: ModuleType) -> None:
    """Start the process of rank 0 alone (``srt/entrypoints/engine.py``)."""
    module._calculate_rank_ranges = lambda node_rank: (range(1), range(1), 1, 1)  # type: ignore[attr-defined]


def one_scheduler_forked(module: ModuleType) -> None:
    """Start the process of rank 0 alone, as a fork."""
    one_scheduler(module)
    fork_processes(module)


def stages_of_both_kinds(module: ModuleType) -> None:
    """Make each second layer's indexer one of a stage that is not the last (``layers/attention/dsa/dsa_indexer.py``).

    There it leaves one SM free, for what the stage before sends.
    """
    init = module.Indexer.__init__

    def init_in_a_stage(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.logits_with_pp_recv = self.layer_id % 2 == 0

    module.Indexer.__init__ = init_in_a_stage


class NoPipe:
    """In place of the pipe to a scheduler that was not started."""

    def send(self, message: Any) -> None:
        """Say nothing to anybody."""

    def recv(self) -> dict[str, Any]:
        """Nothing is known of it."""
        return {}


class OneScheduler(dict[Any, Any]):
    """Ranks → process and pipe, with a `NoPipe` for each rank that was not started."""

    def __missing__(self, ranks: Any) -> tuple[int, NoPipe]:
        return 0, NoPipe()


def one_group(module: ModuleType) -> None:
    """Send all requests to rank 0 of data parallel attention (``data_parallel_controller.py``).

    The others have as many tokens: torch's FakeProcessGroup gathers copies of this rank's numbers.
    """
    launch = module.DataParallelController.launch_dp_attention_schedulers

    def launch_one(self: Any, *args: Any) -> None:
        self.prelaunched_schedulers = OneScheduler(self.prelaunched_schedulers)
        launch(self, *args)
        self.status = [True] + [False] * (len(self.status) - 1)
        self._active_workers, self._active_count_cache = [0], 1

    module.DataParallelController.launch_dp_attention_schedulers = launch_one


def no_modules(module: ModuleType) -> None:
    """Build none of SGLang's own modules (``kernels/jit/utils/compile/loader.py``)."""
    module.load_jit = lambda *args, **kwargs: Nothing()  # type: ignore[attr-defined]


def keep_no_kernels(module: ModuleType) -> None:
    """Keep kernels of CuTe-DSL in memory alone (``kernels/jit/cute_aot_cache.py``): none was compiled."""
    module.get_jit_cache = lambda *args, **kwargs: module.JITCache()  # type: ignore[attr-defined]


def one_cluster(module: ModuleType) -> None:
    """Answer how many clusters fit: it decides a parameter of a kernel of SGLang's own, which is not built.

    ``kernels/jit/utils/occupancy.py``.
    """
    module.get_max_active_clusters = lambda cluster_size, occupancy: 1  # type: ignore[attr-defined]


def one_chunk_a_sequence(module: ModuleType) -> None:
    """Give linear attention one chunk a sequence, for kernels that do nothing (``kernels/ops/attention/fla/index.py``).

    SGLang reads the sequences' lengths back from the device, whose answers mean nothing here.
    """

    def prepare(cu_seqlens: Any, chunk_size: int) -> Any:
        return cu_seqlens.new_zeros(cu_seqlens.numel() - 1, 2)

    module.prepare_chunk_indices = prepare  # type: ignore[attr-defined]


def no_tracked_states(module: ModuleType) -> None:
    """Keep no states of lightning attention at chunk bounds (``layers/attention/linear/lightning_backend.py``).

    SGLang counts on the device for which sequences it keeps them, and compares with the host's count.
    """
    module.LightningAttentionBackend._prepare_seg_la_track_store = lambda *args: (None, None)


class CompressionPlans:
    """In place of the module that plans DeepSeek-V4's compressed keys: plans of its sizes, which say nothing."""

    def plan_decode(self, requests: Any, *args: Any) -> Any:
        """16 bytes for each request."""
        return _bytes(requests, requests.shape[0], 16)

    plan_decode_legacy = plan_decode

    def plan_prefill(self, requests: Any, *args: Any) -> tuple[Any, Any]:
        """16 and 8 bytes for each token."""
        tokens = args[5]
        return _bytes(requests, tokens, 16), _bytes(requests, tokens, 8)

    def plan_prefill_legacy(self, requests: Any, *args: Any) -> tuple[Any, Any]:
        """The same; it takes fewer arguments."""
        tokens = args[3]
        return _bytes(requests, tokens, 16), _bytes(requests, tokens, 8)


def _bytes(beside: Any, rows: int, columns: int) -> Any:
    import torch

    return torch.zeros(rows, columns, dtype=torch.uint8, device=beside.device)


def plan_nothing(module: ModuleType) -> None:
    """Plan no compressed keys (``kernels/ops/attention/dsv4/compress.py``): SGLang's own module makes these tensors."""
    module._jit_compress_plan_module = CompressionPlans  # type: ignore[attr-defined]
