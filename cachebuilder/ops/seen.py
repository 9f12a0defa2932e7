"""A call of DeepGEMM as an engine made it, and what an op's model makes of it: the inverse of ``prepare``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Tensor:
    """A tensor that was handed over: its shape, its strides in elements, and torch's name of its type."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class SeenCall:
    """One call of a function of DeepGEMM.

    Attributes:
        function: the name that the engine called.
        arguments: those given by position: tensors, tuples of them, numbers, text, None.
        options: those given by name.
        sm_count: DeepGEMM's setting at that moment.
        alignment: DeepGEMM's setting of rows an expert at that moment; None where this copy has none.
    """

    function: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    sm_count: int = 0
    alignment: int | None = None

    def by_name(self, *names: str) -> Mapping[str, Any]:
        """The arguments by name, those given by position named in this order; one that was not given is None.

        Raises:
            Inexpressible: there are more by position than names, or one is given by another name.
        """
        if len(self.arguments) > len(names):
            raise Inexpressible(f"{len(self.arguments)} arguments by position")
        if unknown := self.options.keys() - set(names):
            raise Inexpressible(f"the argument {min(unknown)}")
        given = dict(zip(names, self.arguments, strict=False)) | dict(self.options)
        return {name: given.get(name) for name in names}


@dataclass(frozen=True)
class Sighting:
    """The op that a call belongs to.

    Attributes:
        fields: the op's fields, without its maximum.
        value: of the op's maximum, as this call needs it; None for an op without one.
    """

    fields: Mapping[str, Any]
    value: int | None


class Inexpressible(ValueError):
    """A call that its op's fields cannot express; says what in it."""


def tensor(value: Any, dimensions: int, *dtypes: str) -> Tensor:
    """``value``, which must be a tensor of so many dimensions and one of these types. Raises `Inexpressible`."""
    if not isinstance(value, Tensor) or len(value.shape) != dimensions or value.dtype not in dtypes:
        raise Inexpressible(f"{value} where {dimensions} dimensions of {' or '.join(dtypes)} are known")
    return value


def element_format(operand: Tensor) -> str:
    """``fp8``, or ``fp4``, which is bytes of two elements. Raises `Inexpressible` for another type."""
    require(operand.dtype in ("float8_e4m3fn", "int8", "uint8"), f"elements of {operand.dtype}")
    return "fp8" if operand.dtype == "float8_e4m3fn" else "fp4"


def in_elements(operand: Tensor) -> Tensor:
    """``operand`` with its shape in elements: FP4 has two to a byte of K, which comes last."""
    if element_format(operand) == "fp8":
        return operand
    return replace(operand, shape=(*operand.shape[:-1], 2 * operand.shape[-1]))


def require(holds: bool, what: str) -> None:
    """Raises `Inexpressible` with ``what`` unless ``holds``."""
    if not holds:
        raise Inexpressible(what)
