"""Lets the engine's other compilers compile nothing: no kernel runs on the virtual GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from _cachebuilder_calls import note  # type: ignore[import-not-found]


class Nothing:
    """A compiled kernel that does nothing, whatever is asked of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """A launch: no kernel runs on the virtual GPU."""

    def init(self, *args: Any) -> Nothing:
        """The runner that a module of FlashInfer's makes, as ``fused_moe_90`` does."""
        return self

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def plan(self, *args: Any, **kwargs: Any) -> list[int]:
        """A plan of attention, which FlashInfer 0.7.2 wants to be there (``prefill.py``)."""
        return []


class CompilesNothing:
    """In place of CuTe-DSL's ``cute.compile``, which is called and, with options, indexed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        """Take a kernel's source, and compile nothing."""
        return Nothing()

    def __getitem__(self, options: Any) -> CompilesNothing:
        return self


class GemmsOfNothing(Nothing):
    """In place of FlashInfer's module ``fp8_blockscale_gemm_90``, and of the runner that it makes."""

    def get_workspace_size(self, m: int, n: int, k: int) -> int:
        """No memory is needed."""
        return 0


def no_cute_dsl(module: ModuleType) -> None:
    """Spare the minutes that CuTe-DSL takes for a kernel that never runs (nvidia-cutlass-dsl 4.5.2)."""
    module.compile = CompilesNothing()  # type: ignore[attr-defined]


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
    module.verify_symlinked_headers = lambda *args, **kwargs: None  # type: ignore[attr-defined]


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


def no_choice_kept(module: ModuleType) -> None:
    """Keep no configuration that was chosen by timing: on the virtual GPU, all take as long.

    All candidates are compiled by then, and the card chooses among them (torch 2.11
    ``_inductor/runtime/autotune_cache.py``, whose files are named ``.best_config``).
    """

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing is saved. Compiled kernels are pickled with this method, by its name."""

    module.AutotuneCache.save = save
