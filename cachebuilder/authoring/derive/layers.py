"""A model's layers as a family describes them: whole, with what is needed to cut them for one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Part:
    """One weight of the checkpoint in a linear layer that may hold several.

    Attributes:
        name: below the decoder layer, as ``self_attn.q_proj``.
        n: rows, whole.
        how: where n comes from, in the config's own words.
        least: rows below which it is not cut; further ranks hold copies (K and V heads under more ranks than heads).
    """

    name: str
    n: int
    how: str
    least: int = 0


@dataclass(frozen=True)
class Linear:
    """A linear layer as the engine runs it: one GEMM of weight [ΣN, K].

    Attributes:
        module: the engine's name below the decoder layer.
        split: the dimension that is divided among ``ranks``.
        layers: numbers of the decoder layers that have one.
        tokens: the largest M, where it is not the engine's batch.
        beside: tokens up to which the engine also calls it beside other work, and the SM count that it sets then.
        note: one more sentence for the manifest.
    """

    module: str
    parts: tuple[Part, ...]
    k: int
    k_how: str
    split: Literal["n", "k", "none"]
    ranks: int
    layers: tuple[int, ...]
    tokens: int | None = None
    beside: tuple[int, int] | None = None
    note: str = ""

    @property
    def n(self) -> int:
        """Rows, whole."""
        return sum(part.n for part in self.parts)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer: w13 [count, 2·intermediate, hidden] and w2 [count, hidden, intermediate].

    Attributes:
        fused: shared experts that are more of them, on each rank.
        clamp: the limit of the activation, which a mega-MoE applies itself.
        mxfp4: weights in MXFP4; else in FP8 with block scales.
    """

    module: str
    count: int
    topk: int
    hidden: int
    intermediate: int
    layers: tuple[int, ...]
    how: str
    fused: int = 0
    clamp: float | None = None
    mxfp4: bool = False


@dataclass(frozen=True)
class LeftOut:
    """Something that the model runs and that the manifest does not hold, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Call:
    """A call of a DeepGEMM function that is neither a linear layer's nor the experts': the op and its fields.

    Attributes:
        what: which part of the model makes it, for the manifest.
    """

    op: str
    fields: Mapping[str, object]
    what: str


@dataclass
class Model:
    """All of a model's layers that matter here.

    Attributes:
        unknown: what a family could not tell from the config.
    """

    linears: list[Linear] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def numbers_text(layers: Sequence[int]) -> str:
    """Layer numbers as ``0–2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(layers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [f"{a}" if a == b else f"{a}–{b}" for a, b in runs]
    # Layers in a fixed stride, as a hybrid model's, would fill lines.
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", *shown[-2:]])
