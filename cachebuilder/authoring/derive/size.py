"""Numbers of a model's config that keep the arithmetic by which they came about."""

from __future__ import annotations


class Size(int):
    """A whole number, and in ``how`` the terms it was computed from: sums and products of sizes keep them.

    ``heads * (nope + rope)`` is 24576, and its ``how`` is ``num_attention_heads 128 · (qk_nope_head_dim 128 +
    qk_rope_head_dim 64)``. All other arithmetic gives a plain int.
    """

    how: str

    def __new__(cls, value: int, how: str) -> Size:
        """An int is immutable, so its value is given here."""
        size = super().__new__(cls, value)
        size.how = how
        return size

    @property
    def equation(self) -> str:
        """``how = value``; for a field of the config, whose ``how`` ends with its value, that alone."""
        return self.how if self.how.partition(" ")[2] == str(int(self)) else f"{self.how} = {int(self)}"

    def __add__(self, other: int) -> Size:
        return Size(int(self) + int(other), f"{self.how} + {_how(other)}")

    def __mul__(self, other: int) -> Size:
        return Size(int(self) * int(other), f"{_factor(self)} · {_factor(other)}")

    def __rmul__(self, other: int) -> Size:
        return Size(int(other) * int(self), f"{other} · {_factor(self)}")


def _how(number: int) -> str:
    return number.how if isinstance(number, Size) else str(number)


def _factor(number: int) -> str:
    """A term as it stands in a product: sums in parentheses."""
    how = _how(number)
    return f"({how})" if " + " in how else how
