"""A model's layers as a family describes them: whole, with what is needed to divide them among ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cachebuilder.authoring.derive.size import Size


@dataclass(frozen=True)
class Part:
    """One weight of the checkpoint in a linear layer, which may hold several.

    Attributes:
        name: below the decoder layer, as ``self_attn.q_proj``.
        n: rows of the whole weight.
        least: rows that are never divided; further ranks hold copies (K and V heads, where ranks outnumber them).
    """

    name: str
    n: Size
    least: int = 0


@dataclass(frozen=True)
class Linear:
    """A linear layer as the engine runs it: one GEMM of weight [ΣN, K].

    Attributes:
        module: the engine's name below the decoder layer.
        split: the dimension that is divided among ``ranks``.
        layers: numbers of the decoder layers that have one.
        tokens: the largest M, where it is not the engine's batch.
        checked: an engine refuses a division within one of the checkpoint's blocks, as its own check says.
        beside: up to how many tokens the engine also calls it beside other work, and the SM count that it then sets.
        note: one more sentence for the manifest.
    """

    module: str
    parts: tuple[Part, ...]
    k: Size
    split: Literal["n", "k", "none"]
    ranks: int
    layers: tuple[int, ...]
    tokens: int | None = None
    checked: bool = True
    beside: tuple[int, int] | None = None
    note: str = ""


@dataclass(frozen=True)
class Linears:
    """Makes the linear layers that the same decoder layers have and the same ranks share.

    Named after the engines' classes: ``ReplicatedLinear``, ``ColumnParallelLinear``, ``RowParallelLinear``.
    """

    layers: tuple[int, ...]
    ranks: int

    def replicated(self, module: str, n: Size | Sequence[Part], k: Size) -> Linear:
        """Whole on every rank. ``n``: the rows of the one weight, or the weights that are fused."""
        return Linear(module, _parts(module, n), k, "none", 1, self.layers)

    def column(self, module: str, n: Size | Sequence[Part], k: Size) -> Linear:
        """N divided among the ranks."""
        return Linear(module, _parts(module, n), k, "n", self.ranks, self.layers)

    def row(self, module: str, n: Size | Sequence[Part], k: Size) -> Linear:
        """K divided among the ranks."""
        return Linear(module, _parts(module, n), k, "k", self.ranks, self.layers)

    def gated_mlp(self, module: str, hidden: Size, intermediate: Size, fused: bool = True) -> list[Linear]:
        """``gate_up_proj`` and ``down_proj``; not ``fused``: ``gate_proj``, ``up_proj`` and ``down_proj``."""
        gate_and_up = [Part(f"{module}.{name}_proj", intermediate) for name in ("gate", "up")]
        layers = {f"{module}.gate_up_proj": gate_and_up} if fused else {part.name: [part] for part in gate_and_up}
        return [
            *(self.column(name, parts, hidden) for name, parts in layers.items()),
            self.row(f"{module}.down_proj", hidden, intermediate),
        ]


def _parts(module: str, n: Size | Sequence[Part]) -> tuple[Part, ...]:
    return (Part(module, n),) if isinstance(n, Size) else tuple(n)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer: w13 [count, 2·intermediate, hidden] and w2 [count, hidden, intermediate].

    Attributes:
        topk: experts that a token goes to, the fused ones included.
        fused: shared experts that each rank holds as additional routed ones.
        clamp: the limit of the activation, which a mega-MoE applies itself.
        mxfp4: weights in MXFP4; else in FP8 with block scales.
    """

    count: Size
    topk: int
    hidden: Size
    intermediate: Size
    layers: tuple[int, ...]
    fused: int = 0
    clamp: float | None = None
    mxfp4: bool = False
    module: str = "mlp.experts"

    @property
    def sizes(self) -> dict[str, object]:
        """The fields that the ops around a mega-MoE have in common."""
        return {"experts": self.count, "topk": self.topk, "hidden": self.hidden}


@dataclass(frozen=True)
class LeftOut:
    """Something that the model runs and that the manifest does not hold, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Call:
    """A call of a DeepGEMM function for something other than a linear layer or an expert GEMM: the op and its fields.

    Attributes:
        what: which part of the model makes it, for the manifest.
    """

    op: str
    fields: Mapping[str, object]
    what: str


@dataclass
class Model:
    """All of a model's layers that can reach DeepGEMM.

    Attributes:
        name: what stands before the modules' names in the checkpoint, for each layer's number.
        abbreviated: the checkpoint's list of unquantised modules may have the ends of their names alone.
        unused: fields of the config on which no shape of this model depends.
        unknown: what the config leaves open.
    """

    name: Callable[[int], str] = "model.layers.{}.".format
    abbreviated: bool = False
    linears: list[Linear] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unused: tuple[str, ...] = ()
    unknown: list[str] = field(default_factory=list)


def layers_text(layers: Sequence[int]) -> str:
    """Layer numbers as ``layers 0–2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(layers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{first}" if first == last else f"{first}–{last}" for first, last in runs]
    # The layers of a hybrid model, each fourth one for example, would fill lines.
    return "layers " + ", ".join(texts if len(texts) <= 6 else [*texts[:3], "…", *texts[-2:]])
