"""The ops that a manifest may name.

A new op is one class in the file of its family, whose ``op`` field is a ``Literal`` of its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args, get_origin

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

_FAMILIES = (
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


def _ops() -> Iterator[tuple[str, type[OpBase]]]:
    """Name and model of each op: a class of a family whose ``op`` field is a ``Literal``."""
    for family in _FAMILIES:
        for model in vars(family).values():
            if isinstance(model, type) and issubclass(model, OpBase):
                annotation = model.model_fields["op"].annotation
                if get_origin(annotation) is Literal:
                    yield get_args(annotation)[0], model


#: op name → its model, in alphabetical order.
OPS: dict[str, type[OpBase]] = dict(sorted(dict(_ops()).items()))

if TYPE_CHECKING:
    Op = OpBase
else:
    #: Any op; its ``op`` field says which.
    Op = Annotated[Union[tuple(OPS.values())], Field(discriminator="op")]  # noqa: UP007

__all__ = ["OPS", "Op", "OpBase"]
