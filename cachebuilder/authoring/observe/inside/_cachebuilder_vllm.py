"""What is done in vLLM's processes so that they run on a virtual GPU, and what its configuration says.

Read in vLLM 0.25.0; run with 0.25.0 and 0.33.0.
"""

from __future__ import annotations

import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

from _cachebuilder_calls import note, note_weights  # type: ignore[import-not-found]


def note_settings(module: ModuleType) -> None:
    """Write down vLLM's configuration as it resolved it, each time it makes one."""
    resolve = module.VllmConfig.__post_init__

    def resolve_and_note(self: Any) -> None:
        resolve(self)
        scheduler, model = self.scheduler_config, self.model_config
        note(
            {
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "max_num_seqs": scheduler.max_num_seqs,
                "max_model_len": model.max_model_len if model else None,
            }
        )

    module.VllmConfig.__post_init__ = resolve_and_note


def note_loaded_weights(module: ModuleType) -> None:
    """Write down the quantised modules of each model that vLLM loads, once their weights are as kernels read them."""
    load = module.BaseModelLoader.load_model

    def load_and_note(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        note_weights(model)
        return model

    module.BaseModelLoader.load_model = load_and_note


def note_context_chunk(module: ModuleType) -> None:
    """Write down how many cached tokens vLLM's MLA takes up at once, when it computes that."""
    builder = getattr(module, "MLACommonMetadataBuilder", None)
    compute = getattr(builder, "determine_chunked_prefill_workspace_size", None)
    if builder is None or compute is None:
        return

    def compute_and_note(*args: Any, **kwargs: Any) -> Any:
        tokens = compute(*args, **kwargs)
        note({"context_chunk": int(tokens)})
        return tokens

    builder.determine_chunked_prefill_workspace_size = staticmethod(compute_and_note)


def fork_with_a_gpu(module: ModuleType) -> None:
    """Let vLLM fork after it has asked for the GPU, as 0.33.0 does before it starts the engine's process.

    A real GPU cannot be used in a fork; the virtual one's state is this process's own memory. vLLM would spawn
    (``_maybe_force_spawn``), and torch would refuse the GPU in the fork (``torch/cuda/__init__.py``).
    """
    import torch

    module.cuda_is_initialized = lambda: False  # type: ignore[attr-defined]
    torch.cuda._is_in_bad_fork = lambda: False


def log_no_experts(module: ModuleType) -> None:
    """Leave the list of a rank's experts out of vLLM's log.

    It reads from the GPU how many there are (``torch.where``), which may be any number here
    (``layers/fused_moe/expert_map_manager.py``, 0.25.0 and 0.33.0).
    """
    module.ExpertMapManager.get_compressed_map_string = lambda self: ""


def strides_without_memory(module: ModuleType) -> None:
    """Let vLLM 0.25.0 ask for the strides of a cache of states without as much memory of the host.

    It makes a tensor of the cache's shape on the CPU, reads its strides and drops it (``_reshape_kv_cache_tensors``).
    A host that serves has that address space; this one may not, and a model with few layers has a large cache.
    """
    import torch

    reshape = getattr(module.GPUModelRunner, "_reshape_kv_cache_tensors", None)
    if reshape is None or "torch.empty(target_shape).stride()" not in inspect.getsource(reshape):
        return

    def reshape_on_meta(*args: Any, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return reshape(*args, **kwargs)

    module.GPUModelRunner._reshape_kv_cache_tensors = reshape_on_meta


def accept_every_draft(module: ModuleType) -> None:
    """Let each request accept all of its drafts, and no more than it has.

    Where a request has fewer drafts than another one of its step, vLLM's kernel leaves places empty. A virtual GPU runs
    no kernel, so they hold a token: vLLM would count tokens that it has not scheduled, and the request would never end
    (``v1/sample/rejection_sampler.py``, 0.25.0 and 0.33.0).
    """
    forward = module.RejectionSampler.forward

    def forward_and_accept(self: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        output = forward(self, metadata, *args, **kwargs)
        tokens = torch.zeros_like(output.sampled_token_ids, device="cpu")
        for row, drafts in enumerate(metadata.num_draft_tokens):
            tokens[row, drafts + 1 :] = module.PLACEHOLDER_TOKEN_ID
        output.sampled_token_ids.copy_(tokens)
        return output

    module.RejectionSampler.forward = forward_and_accept


def one_accepted_token_at_least(module: ModuleType) -> None:
    """Let a sequence have accepted one token at least, before the states of its linear attention are moved.

    vLLM 0.33.0 counts on the device how many drafts a step accepted, and reads the number back; here it is none
    (``v1/worker/mamba_utils.py``, ``preprocess_mamba``).
    """
    preprocess = module.preprocess_mamba

    def preprocess_accepted(*args: Any, **kwargs: Any) -> None:
        batch = inspect.signature(preprocess).bind(*args, **kwargs).arguments["input_batch"]
        batch.num_accepted_tokens_cpu_tensor.clamp_(min=1)
        preprocess(*args, **kwargs)

    module.preprocess_mamba = preprocess_accepted  # type: ignore[attr-defined]


def group_of_engines(module: ModuleType) -> None:
    """Join the other data parallel engines by a group that does nothing (vLLM 0.25.0 ``distributed/utils.py``)."""

    def join(host: str, port: int, rank: int, world_size: int, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.testing._internal.distributed.fake_pg import FakeProcessGroup, FakeStore

        store, kind = FakeStore(), torch.distributed.ProcessGroup.BackendType.CUSTOM
        group = torch.distributed.ProcessGroup(store, rank, world_size)
        group._set_default_backend(kind)
        for device in ("cpu", "cuda"):
            group._register_backend(torch.device(device), kind, FakeProcessGroup._create_internal(rank, world_size))
        return (group, store) if kwargs.get("return_store") else group

    module.stateless_init_torch_distributed_process_group = join  # type: ignore[attr-defined]


def engines_do_the_same(module: ModuleType) -> None:
    """Answer for the other data parallel engines: each has as many tokens as this one.

    vLLM 0.25.0 ``v1/worker/dp_utils.py`` and ``v1/worker/gpu/dp_utils.py``: a column for each engine, this one's set.
    """

    def all_reduce(columns: Any, *args: Any, **kwargs: Any) -> None:
        values = columns.cpu()
        columns.copy_(values[:, :1].repeat(1, values.shape[1]))

    module.dist = SimpleNamespace(all_reduce=all_reduce)  # type: ignore[attr-defined]


def start_one_engine(module: ModuleType) -> None:
    """Shake hands with the one data parallel engine that runs (``v1/engine/utils.py``, vLLM 0.25.0 and 0.33.0)."""
    wait = module.wait_for_engine_startup
    parameters = inspect.signature(wait)

    def wait_for_own(*args: Any, **kwargs: Any) -> None:
        call = parameters.bind(*args, **kwargs)
        call.arguments["core_engines"] = [engine for engine in call.arguments["core_engines"] if engine.local]
        wait(*call.args, **call.kwargs)

    module.wait_for_engine_startup = wait_for_own  # type: ignore[attr-defined]


def coordinate_one_engine(module: ModuleType) -> None:
    """Wait for no other data parallel engine (vLLM 0.25.0 ``v1/engine/coordinator.py``)."""
    init = module.DPCoordinatorProc.__init__
    module.DPCoordinatorProc.__init__ = lambda self, engine_count, *args, **kwargs: init(self, 1, *args, **kwargs)
