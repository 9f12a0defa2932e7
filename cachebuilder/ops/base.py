"""The base of all ops.

An op is one of DeepGEMM's functions as a manifest names it. The fields of its model are the manifest's; its methods say
which values are swept, how DeepGEMM is called for one of them, and what the result must be. Ops of one family share a
file of this package, and `catalog` lists them all. Nothing here imports torch: ``prepare`` and ``trial`` get the loaded
modules in a `Device`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from cachebuilder.ops.device import Device
from cachebuilder.ops.seen import Inexpressible, SeenCall, Sighting
from cachebuilder.ops.trial import Trial

#: DeepGEMM reads A and B through TMA descriptors, whose row strides are multiples of 16 bytes (CUDA driver API,
#: ``cuTensorMapEncodeTiled``, parameter ``globalStrides``): 16 FP8 elements of K, 8 BF16 elements of N.
Fp8K = Annotated[int, Field(ge=16, le=1 << 20, multiple_of=16, description="K, a multiple of 16 (TMA row stride)")]
#: ``k % 64 == 0`` is asserted by DeepGEMM 2.6.1, ``csrc/jit_kernels/impls/sm90_bf16_gemm.hpp``.
Bf16K = Annotated[int, Field(ge=64, le=1 << 20, multiple_of=64, description="K, a multiple of 64")]
N = Annotated[int, Field(ge=8, le=1 << 20, multiple_of=8, description="N, a multiple of 8 (TMA row stride of D)")]
Experts = Annotated[int, Field(ge=1, le=4096, description="experts on this rank")]
Tokens = Annotated[int, Field(ge=1, le=1 << 20, description="the largest number of tokens in one call")]
SmCounts = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]

#: Which of M, N and K DeepGEMM writes into the kernel as constants. Left out, DeepGEMM's own default applies, as it
#: does in an engine: ``""`` for dense ops in sgl-deep-gemm 0.1.4 and 0.2.3.post2 (``deep_gemm/__init__.py``), ``"nk"``
#: in the copy inside vLLM 0.33.0 (``vllm/third_party/deep_gemm/_C.py``).
CompiledDims = Annotated[
    Literal["", "m", "n", "k", "mn", "mk", "nk", "mnk"] | None,
    Field(description="dimensions compiled in as constants; left out: DeepGEMM's default"),
]


#: Fields that schema version 1 did not have from the start.
_NEWER_FIELDS = ("sm_counts", "max_rows")


class OpBase(BaseModel):
    """Base of the ops: the fields that all of them have, and the methods that a sweep calls."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    #: The name of the swept variable in reports, as ``m`` or ``expected_m``.
    variable: ClassVar[str] = "m"
    #: The field that says how far `variable` goes; None where the shape says it.
    maximum: ClassVar[str | None] = None
    #: The function's names in DeepGEMM's versions, preferred name first; empty: the op's own name.
    entry_points: ClassVar[tuple[str, ...]] = ()
    #: Names of other ops' functions that are the same function, which then looks at its operands.
    also_called: ClassVar[tuple[str, ...]] = ()
    #: Major compute capabilities of the GPUs on which any DeepGEMM has the op.
    majors: ClassVar[tuple[int, ...]] = (9, 10, 12)
    #: The DeepGEMMs that have the function, for the error if the installed one lacks it; empty: all known ones.
    found_in: ClassVar[str] = ""

    op: str
    compiled_dims: CompiledDims = None
    sm_counts: Annotated[
        SmCounts | None,
        Field(description="SM counts that the engine sets around this op's calls; left out: the target's"),
    ] = None

    @model_serializer(mode="wrap")
    def _without_unset_newer_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave newer fields out where they are unset: plans and artifacts written before they existed lack them."""
        fields: dict[str, Any] = dump(self)
        for name in _NEWER_FIELDS:
            if fields.get(name, ...) is None:
                del fields[name]
        return fields

    def function(self, deep_gemm: ModuleType) -> Callable[..., Any]:
        """DeepGEMM's function for this op. Raises LookupError with its name if this DeepGEMM has none."""
        names = self.entry_points or (self.op,)
        for name in names:
            if function := getattr(deep_gemm, name, None):
                return cast("Callable[..., Any]", function)
        raise LookupError(" or ".join(names) + (f" (found in {self.found_in})" if self.found_in else ""))

    def unsupported(self, major: int) -> str | None:
        """Why no DeepGEMM has this op on a GPU of major compute capability ``major``; None if one has it."""
        if major in self.majors:
            return None
        archs = ", ".join(f"SM{major}0" for major in self.majors)
        return f"{self.op} exists on {archs} only"

    def options(self) -> dict[str, Any]:
        """DeepGEMM's keyword arguments that the manifest sets."""
        return {} if self.compiled_dims is None else {"compiled_dims": self.compiled_dims}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of DeepGEMM's functions that are this op."""
        return (cls.model_fields["op"].annotation.__args__[0], *cls.entry_points, *cls.also_called)  # type: ignore[union-attr]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """The fields with which this op asks for the kernels of ``call``, a call of one of `names`.

        Raises:
            Inexpressible: the op has no fields for this call.
        """
        raise Inexpressible("this op cannot be read from a call yet")

    def shape(self) -> str:
        """The op's shape in a few characters, as ``n=2112 k=7168``."""
        skip = {"op", "max_tokens", "compiled_dims", "sm_counts"}
        fields = self.model_dump(exclude_none=True).items()
        text = " ".join(f"{k}={_short(v)}" for k, v in fields if k not in skip)
        return text if self.compiled_dims is None else f"{text} compiled_dims={self.compiled_dims!r}"

    def points(self, device: Device) -> range:
        """Values of `variable` at which DeepGEMM is called, ascending."""
        raise NotImplementedError

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Allocate for the largest point; returns the call for one point."""
        raise NotImplementedError

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """Call DeepGEMM at one point on random inputs; returns its outputs beside the expected ones.

        Equal arguments give equal inputs. Only a real GPU writes the outputs; a virtual one runs no kernel.

        Raises:
            NotImplementedError: the op has no reference for these fields.
        """
        raise NotImplementedError

    def reference(self, device: Device) -> Callable[[int], None] | None:
        """Torch's own BF16 call for one point, to time beside DeepGEMM's; None if torch has no such call."""
        return None


def _short(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


class TokenOp(OpBase):
    """An op whose M is a number of tokens, from 1 to ``max_tokens`` (the manifest's, unless the op gives its own)."""

    maximum: ClassVar[str | None] = "max_tokens"

    max_tokens: Tokens | None = None

    @property
    def has_maximum(self) -> bool:
        """Whether the op itself says how far it goes."""
        return self.max_tokens is not None

    @property
    def largest_m(self) -> int:
        """``max_tokens``; the manifest fills it in if the op gives none."""
        assert self.max_tokens is not None, "the manifest fills max_tokens in"
        return self.max_tokens

    def points(self, device: Device) -> range:
        """Every M from 1 to ``max_tokens``."""
        return range(1, self.largest_m + 1)
