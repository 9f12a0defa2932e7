"""What a manifest says of FlashInfer: the modules that an engine needs, and the shapes of its GEMMs."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cachebuilder.flashinfer import entries

#: vLLM takes FlashInfer's GEMM for M below this (0.25.0 to 0.33.0,
#: ``vllm/model_executor/kernels/linear/scaled_mm/flashinfer.py``).
VLLM_SWITCH = 32


def _check_module(name: str) -> str:
    if not entries.is_module(name):
        raise ValueError(f"wanted the name of a FlashInfer module, such as {entries.GEMM_MODULE}, found {name[:100]!r}")
    return name


class Gemm(BaseModel):
    """D[M, N] = A[M, K] · B[N, K]ᵀ by FlashInfer's ``fp8_blockscale_gemm_sm90``: BF16 activations, FP8 weight [n, k].

    The function itself asks for N in multiples of 64 and K in multiples of 128 (``flashinfer/gemm/gemm_base.py``,
    0.6.13).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    n: Annotated[int, Field(ge=64, le=1 << 20, multiple_of=64, description="N, a multiple of 64")]
    k: Annotated[int, Field(ge=128, le=1 << 20, multiple_of=128, description="K, a multiple of 128")]
    max_m: Annotated[
        int, Field(ge=1, le=1 << 20, description="the largest M; vLLM takes DeepGEMM's own kernels from M = 32 on")
    ] = VLLM_SWITCH - 1

    def __str__(self) -> str:
        return f"n={self.n} k={self.k}"


class FlashInferNeeds(BaseModel):
    """What an engine takes from FlashInfer that FlashInfer would compile at run time."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    modules: Annotated[
        list[Annotated[str, AfterValidator(_check_module)]],
        Field(description="modules by FlashInfer's names for them, such as concat_mla"),
    ] = []
    gemms: Annotated[list[Gemm], Field(description="shapes of the FP8 GEMM for small M, on SM90")] = []

    @property
    def all_modules(self) -> list[str]:
        """The modules to build, by name: those that are listed, and the one with the GEMMs if there are shapes."""
        return sorted({*self.modules, *([entries.GEMM_MODULE] if self.gemms else [])})

    def problem(self, major: int) -> str | None:
        """What is wrong with it for a GPU of major compute capability ``major``; None if nothing is."""
        if not self.modules and not self.gemms:
            return "wanted modules, or gemms; found neither"
        if self.gemms and major != 9:
            return "gemms: FlashInfer has this GEMM on SM90 only"
        for name, values in (("modules", self.modules), ("gemms", [(gemm.n, gemm.k) for gemm in self.gemms])):
            if twice := [value for index, value in enumerate(values) if value in values[:index]]:
                return f"{name}: wanted each once, found {twice[0]} twice"
        return None
