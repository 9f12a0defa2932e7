"""The ops that a manifest may name.

A new op is one class in the file of its family, whose ``op`` field is a ``Literal`` of its name, and one line here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union, get_args

from pydantic import Field

from cachebuilder.ops import (
    dense,
    einsum,
    grouped,
    hyper_connections,
    k_grouped,
    layout,
    mega_gate,
    mega_moe,
    mega_moe_sm100_ops,
    mqa_logits,
    pre_dispatch,
    sparse_mqa_logits,
)
from cachebuilder.ops.base import OpBase

_MODELS: tuple[type[OpBase], ...] = (
    dense.Bf16GemmNn,
    dense.Bf16GemmNt,
    dense.Bf16GemmTn,
    dense.Bf16GemmTt,
    dense.Fp8Fp4GemmNt,
    dense.Fp8GemmNn,
    dense.Fp8GemmNt,
    dense.Fp8GemmNtSkipHeadMid,
    dense.Fp8GemmTn,
    dense.Fp8GemmTt,
    einsum.Einsum,
    einsum.Fp8Einsum,
    grouped.MGroupedBf16GemmNnContiguous,
    grouped.MGroupedBf16GemmNtContiguous,
    grouped.MGroupedBf16GemmNtMasked,
    grouped.MGroupedFp8Fp4GemmNtContiguous,
    grouped.MGroupedFp8Fp4GemmNtMasked,
    grouped.MGroupedFp8GemmNnContiguous,
    grouped.MGroupedFp8GemmNtContiguous,
    grouped.MGroupedFp8GemmNtMasked,
    hyper_connections.MegaMhc,
    hyper_connections.Tf32HcPrenormGemm,
    k_grouped.KGroupedBf16GemmTnContiguous,
    k_grouped.KGroupedFp8GemmNtContiguous,
    k_grouped.KGroupedFp8GemmTnContiguous,
    layout.GetMnMajorTmaAlignedPackedUe8m0Tensor,
    layout.GetMnMajorTmaAlignedTensor,
    layout.TransformSfIntoRequiredLayout,
    mega_gate.Bf16MegaGate,
    mega_moe.Fp8MegaMoe,
    mega_moe_sm100_ops.Bf16MegaMoe,
    mega_moe_sm100_ops.Fp4Fp4MegaMoe,
    mega_moe_sm100_ops.Fp8Fp4MegaMoe,
    mega_moe_sm100_ops.Nvfp4MegaMoe,
    mqa_logits.Fp8Fp4MqaLogits,
    mqa_logits.Fp8Fp4PagedMqaLogits,
    mqa_logits.Fp8MqaLogits,
    mqa_logits.Fp8PagedMqaLogits,
    mqa_logits.GetPagedMqaLogitsMetadata,
    pre_dispatch.MegaMoePreDispatch,
    pre_dispatch.MegaMoePreDispatchSm90,
    sparse_mqa_logits.Fp8Fp4PagedSparseMqaLogits,
    sparse_mqa_logits.Fp8Fp4SparseMqaLogits,
    sparse_mqa_logits.GetPagedSparseMqaLogitsMetadata,
    sparse_mqa_logits.GetSparseMqaLogitsMetadata,
)


def _name(model: type[OpBase]) -> str:
    return str(get_args(model.model_fields["op"].annotation)[0])


#: op name → its model, in alphabetical order.
OPS: dict[str, type[OpBase]] = {_name(model): model for model in sorted(_MODELS, key=_name)}

if TYPE_CHECKING:
    Op = OpBase
else:
    #: Any op; its ``op`` field says which.
    Op = Annotated[Union[tuple(OPS.values())], Field(discriminator="op")]  # noqa: UP007

__all__ = ["OPS", "Op", "OpBase"]
