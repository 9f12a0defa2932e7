"""What is done in an engine's processes so that they run on a virtual GPU, and what its configuration says.

From vLLM 0.25.0; each function names its file.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

from _cachebuilder_calls import note, note_weights  # type: ignore[import-not-found]


def one_rank_of_many(module: ModuleType) -> None:
    """Make this process one rank of as many as it asks for: each process group is one that does nothing.

    torch's own FakeProcessGroup stands for the other ranks (``torch/testing/_internal/distributed/fake_pg.py``).
    """
    init, new_group = module.init_process_group, module.new_group

    def init_process_group(*args: Any, rank: int = 0, world_size: int = 1, **kwargs: Any) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        init(backend="fake", rank=rank, world_size=world_size, store=FakeStore())

    def new_fake_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    module.init_process_group, module.new_group = init_process_group, new_fake_group  # type: ignore[attr-defined]
    module.monitored_barrier = lambda *args, **kwargs: None  # type: ignore[attr-defined] # only gloo has one


def all_ranks_on_this_machine(module: ModuleType) -> None:
    """Answer for all ranks: vLLM asks each where it runs (``vllm/distributed/parallel_state.py``, 0.25.0)."""
    module.in_the_same_node_as = lambda group, source_rank=0: [True] * group.size()  # type: ignore[attr-defined]


def plain_memory(module: ModuleType) -> None:
    """Make symmetric memory of this rank's own: mega-MoE's buffer (``torch/distributed/_symmetric_memory``)."""
    import torch

    def rendezvous(memory: Any, group: Any) -> SimpleNamespace:
        return SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * group.size(), barrier=lambda: None)

    module.empty, module.rendezvous = torch.empty, rendezvous  # type: ignore[attr-defined]


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
    """Shake hands with the one data parallel engine that runs (vLLM 0.25.0 ``v1/engine/utils.py``)."""
    wait = module.wait_for_engine_startup

    def wait_for_own(socket: Any, addresses: Any, core_engines: Any, *args: Any) -> None:
        wait(socket, addresses, [engine for engine in core_engines if engine.local], *args)

    module.wait_for_engine_startup = wait_for_own  # type: ignore[attr-defined]


def coordinate_one_engine(module: ModuleType) -> None:
    """Wait for no other data parallel engine (vLLM 0.25.0 ``v1/engine/coordinator.py``)."""
    init = module.DPCoordinatorProc.__init__
    module.DPCoordinatorProc.__init__ = lambda self, engine_count, *args, **kwargs: init(self, 1, *args, **kwargs)


def no_message_queue(module: ModuleType) -> None:
    """Make no queue in shared memory: it would wait for a reader in each rank (vLLM 0.25.0 ``shm_broadcast.py``)."""
    module.MessageQueue.create_from_process_group = staticmethod(lambda *args, **kwargs: None)


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


class Nothing:
    """A compiled kernel that does nothing, whatever is asked of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """A launch: no kernel runs on the virtual GPU."""

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class CompilesNothing:
    """In place of CuTe-DSL's ``cute.compile``, which is called and, with options, indexed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        """Take a kernel's source, and compile nothing."""
        return Nothing()

    def __getitem__(self, options: Any) -> CompilesNothing:
        return self


def no_cute_dsl(module: ModuleType) -> None:
    """Spare the minutes that CuTe-DSL takes for a kernel that never runs (nvidia-cutlass-dsl 4.5.2)."""
    module.compile = CompilesNothing()  # type: ignore[attr-defined]


class GemmsOfNothing(Nothing):
    """In place of FlashInfer's module ``fp8_blockscale_gemm_90``, and of the runner that it makes."""

    def init(self) -> GemmsOfNothing:
        """The runner."""
        return self

    def get_workspace_size(self, m: int, n: int, k: int) -> int:
        """No memory is needed."""
        return 0


def no_flashinfer(module: ModuleType) -> None:
    """Let FlashInfer's modules do nothing, and write down which are asked for (FlashInfer 0.6.13 ``jit/core.py``).

    Other modules of GEMMs than the one with a DeepGEMM are built: they answer questions about tactics and memory.
    """
    build_and_load = module.JitSpec.build_and_load

    def note_and_build(self: Any) -> Any:
        if not self.is_aot:  # FlashInfer would compile it
            note({"flashinfer": [self.name]})
        if self.name == "fp8_blockscale_gemm_90":
            return GemmsOfNothing()
        return build_and_load(self) if "gemm" in self.name else Nothing()

    module.JitSpec.build_and_load = note_and_build


def no_tactics(module: ModuleType) -> None:
    """Let FlashInfer take its fallback instead of timing kernels (FlashInfer 0.6.13 ``autotuner.py``)."""
    module.AutoTuner.choose_one = lambda self, name, runners, *args, **kwargs: (runners[0], -1)


def no_cubins(module: ModuleType) -> None:
    """Load and download nothing that belongs to FlashInfer's cubins (FlashInfer 0.6.13, 0.7.2 ``jit/cubin_loader.py``).

    They are for modules that are not built.
    """
    module.setup_cubin_loader = lambda path: None  # type: ignore[attr-defined]
    module.get_artifact = module.get_cubin = lambda *args, **kwargs: b"nothing"  # type: ignore[attr-defined]
    module.get_meta_hash = lambda *args, **kwargs: ""  # type: ignore[attr-defined]


def no_tilelang(module: ModuleType) -> None:
    """Compile only TileLang's kernels that return tensors (TileLang 0.1.9 ``jit/kernel.py``); its cache must be off."""
    compile_kernel = module.JITKernel._compile_and_create_adapter

    def compile_with_outputs(self: Any, source: Any, outputs: Any) -> Any:
        return Nothing() if outputs is None else compile_kernel(self, source, outputs)

    module.JITKernel._compile_and_create_adapter = compile_with_outputs


def no_triton(module: ModuleType) -> None:
    """Let Triton's launches do nothing, and compile nothing (Triton 3.6 ``runtime/jit.py``); a warm-up still does."""
    run = module.JITFunction.run

    def run_nothing(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs) if warmup else None

    module.JITFunction.run = run_nothing


def no_tuning(module: ModuleType) -> None:
    """Let Triton take a kernel's first configuration: all take as long (Triton 3.6 ``runtime/autotuner.py``)."""
    module.Autotuner._bench = lambda self, *args, **kwargs: [1.0, 1.0, 1.0]


def note_sglang_settings(module: ModuleType) -> None:
    """Write down what SGLang's scheduler works with (SGLang 0.5.23 ``srt/managers/scheduler.py``).

    The tokens of all groups of data parallel attention come together before the experts.
    """
    init = module.Scheduler.__init__

    def init_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        groups = getattr(self, "dp_size", None) or 1
        tokens = self.chunked_prefill_size or self.max_prefill_tokens
        note(
            {
                "max_num_batched_tokens": groups * tokens,
                "max_num_seqs": self.max_running_requests,
                "max_model_len": self.model_config.context_len,
            }
        )

    module.Scheduler.__init__ = init_and_note


def note_sglang_weights(module: ModuleType) -> None:
    """Write down the quantised modules of each model that SGLang loads (SGLang 0.5.23 ``model_runner.py``)."""
    load = module.ModelRunner.load_model

    def load_and_note(self: Any) -> None:
        load(self)
        note_weights(self.model)

    module.ModelRunner.load_model = load_and_note


def note_sglang_context(module: ModuleType) -> None:
    """Write down how many cached tokens SGLang's MLA takes up at once, when it asks for that.

    SGLang 0.5.23 ``srt/model_executor/forward_batch_deepseek_mha_mixin.py``.
    """
    mixin = module.ForwardBatchDeepSeekMHAMixin
    capacity = mixin.get_max_chunk_capacity

    def ask_and_note(self: Any) -> int:
        tokens = int(capacity(self))
        note({"context_chunk": tokens})
        return tokens

    mixin.get_max_chunk_capacity = ask_and_note


def one_scheduler(module: ModuleType) -> None:
    """Start the process of rank 0 alone (SGLang 0.5.23 ``srt/entrypoints/engine.py``)."""
    module._calculate_rank_ranges = lambda node_rank: (range(1), range(1), 1, 1)  # type: ignore[attr-defined]


def default_scales_of_keys(module: ModuleType) -> None:
    """Give the KV cache the scales that SGLang gives it where a checkpoint has none (SGLang 0.5.23 ``kv_cache.py``).

    SGLang compares the scales on the device, whose answers mean nothing here.
    """

    def set_defaults(self: Any, layer: Any) -> None:
        for name in ("k_scale", "v_scale"):
            getattr(layer, name).fill_(1.0)
            setattr(layer, f"{name}_float", 1.0)

    module.BaseKVCacheMethod.process_weights_after_loading = set_defaults


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
    """Send all requests to rank 0 of data parallel attention (SGLang 0.5.23 ``data_parallel_controller.py``).

    The others have as many tokens: torch's FakeProcessGroup gathers copies of this rank's numbers.
    """
    launch = module.DataParallelController.launch_dp_attention_schedulers

    def launch_one(self: Any, *args: Any) -> None:
        self.prelaunched_schedulers = OneScheduler(self.prelaunched_schedulers)
        launch(self, *args)
        self.status = [True] + [False] * (len(self.status) - 1)
        self._active_workers, self._active_count_cache = [0], 1

    module.DataParallelController.launch_dp_attention_schedulers = launch_one


def no_sglang_jit(module: ModuleType) -> None:
    """Build none of SGLang's own modules (SGLang 0.5.23 ``kernels/jit/utils/compile/loader.py``)."""
    module.load_jit = lambda *args, **kwargs: Nothing()  # type: ignore[attr-defined]


def one_cluster(module: ModuleType) -> None:
    """Answer how many clusters fit: it decides a parameter of a kernel of SGLang's own, which is not built.

    SGLang 0.5.23 ``kernels/jit/utils/occupancy.py``.
    """
    module.get_max_active_clusters = lambda cluster_size, occupancy: 1  # type: ignore[attr-defined]
