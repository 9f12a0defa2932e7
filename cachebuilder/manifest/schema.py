"""The manifest: what to build a cache for, written as YAML and checked by pydantic models."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cachebuilder.common.reading import read_named
from cachebuilder.common.records import one_line
from cachebuilder.cuda import device as devices
from cachebuilder.cuda import gpus
from cachebuilder.cuda.device import DeviceChoice, DeviceName
from cachebuilder.deepgemm.environment import KernelEnvironment
from cachebuilder.deepgemm.source import foreign_text
from cachebuilder.errors import ManifestError
from cachebuilder.flashinfer.schema import FlashInferNeeds, Gemm
from cachebuilder.manifest import reader
from cachebuilder.manifest.reader import MAX_BYTES, TextError
from cachebuilder.ops.base import SmCounts, TokenOp, Tokens
from cachebuilder.ops.catalog import OPS, Op, OpBase


def _check_source(source: str) -> str:
    if reason := foreign_text(source):
        raise ValueError(reason)
    return source


class Target(BaseModel):
    """The GPU that the cache is for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    gpu: Annotated[
        gpus.Gpu,
        BeforeValidator(
            lambda value: gpus.find(value) if isinstance(value, str) else value,
            # For editors: the known names, any other spelling of them, or a card's fields.
            json_schema_input_type=Literal[tuple(gpus.GPUS)] | str | gpus.Gpu,
        ),
        Field(description="a known GPU's name, or its fields"),
    ]
    sm_counts: Annotated[
        SmCounts | None,
        Field(description="SM counts that the engine sets (set_num_sms); left out: all of the GPU's"),
    ] = None

    @model_validator(mode="after")
    def _check_sm_counts(self) -> Target:
        if reason := self.wrong_sm_counts(self.sm_counts or []):
            raise ValueError(reason)
        return self

    def wrong_sm_counts(self, counts: list[int]) -> str | None:
        """Why this GPU cannot have these SM counts; None if it can."""
        if len(set(counts)) != len(counts):
            return f"wanted each SM count once, found {counts}"
        if counts and max(counts) > self.gpu.sm_count:
            return f"wanted SM counts up to {self.gpu.name}'s {self.gpu.sm_count}, found {max(counts)}"
        return None

    def choose(self, device: DeviceChoice) -> DeviceName:
        """Where to run: ``auto`` is ``cuda`` where this machine's first GPU is the target, else ``virtual``."""
        return devices.choose(device, self.gpu)

    @property
    def all_sm_counts(self) -> list[int]:
        """The SM counts to sweep for an op that has none of its own, ascending."""
        return sorted(self.sm_counts or [self.gpu.sm_count])


class Toolchain(BaseModel):
    """The CUDA compiler to build with: its version is part of DeepGEMM's keys, so serving must find the same one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    nvcc: Annotated[str, Field(pattern=r"^\d+\.\d+$", description="release as nvcc prints it, for example 13.0")]


class Source(BaseModel):
    """A kernel that no op asks for, as DeepGEMM wrote it. `cachebuilder record` and `misses --add-to` find them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: Annotated[
        str,
        Field(min_length=1, max_length=1 << 16, description="the text of kernel.cu"),
        AfterValidator(_check_source),
    ]
    kernel: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z0-9_]{1,120}$",
            description="DeepGEMM's name for it; left out: the name of planned kernels of the same template",
        ),
    ] = None


class Manifest(BaseModel):
    """A whole manifest, with the defaults filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="names the artifact")]
    target: Target
    max_tokens: Annotated[
        Tokens | None, Field(description="the engine's max_num_batched_tokens; for ops that set none themselves")
    ] = None
    ops: Annotated[list[Op], Field(description="the GEMM shapes; may be empty if there are sources")] = []
    sources: Annotated[list[Source], Field(description="kernels to build in addition to those that the ops need")] = []
    flashinfer: Annotated[
        FlashInferNeeds | None,
        Field(description="what the engine takes from FlashInfer that FlashInfer would compile at run time"),
    ] = None
    toolchain: Toolchain | None = None
    environment: Annotated[
        KernelEnvironment,
        Field(description="DG_… variables that the serving process sets and that change its kernels"),
    ] = {}

    @model_validator(mode="after")
    def _fill_and_check_ops(self) -> Manifest:
        filled_ops: list[OpBase] = []
        first_with: dict[tuple[str, int], int] = {}  # shape and SM count → the first op that has both
        for index, op in enumerate(self.ops):
            if reason := op.unsupported(self.target.gpu.major):
                raise _RefusedOp(index, f"not on {self.target.gpu.name}: {reason}")
            if isinstance(op, TokenOp) and not op.has_maximum:
                if self.max_tokens is None:
                    raise _RefusedOp(index, "max_tokens: missing, here or for the whole manifest")
                op = op.model_copy(update={"max_tokens": self.max_tokens})
            if reason := self.target.wrong_sm_counts(op.sm_counts or []):
                raise _RefusedOp(index, f"sm_counts: {reason}")
            shape = op.model_dump_json(exclude={"max_tokens", "max_m", "sm_counts"})
            for sm_count in self.sm_counts_of(op):
                first = first_with.setdefault((shape, sm_count), index)
                if first != index:
                    raise _RefusedOp(index, f"the same shape as ops[{first}]; give it once, with the larger maximum")
            filled_ops.append(op)
        object.__setattr__(self, "ops", filled_ops)
        if not self.ops and not self.sources:
            raise ValueError("wanted ops, or sources; found neither")
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> Manifest:
        first_with: dict[str, int] = {}
        for index, source in enumerate(self.sources):
            first = first_with.setdefault(source.source, index)
            if first != index:
                raise ValueError(f"sources[{index}] is the same as sources[{first}]")
        return self

    @model_validator(mode="after")
    def _check_flashinfer(self) -> Manifest:
        if self.flashinfer and (reason := self.flashinfer.problem(self.target.gpu.major)):
            raise ValueError(f"flashinfer: {reason}")
        return self

    def sm_counts_of(self, op: OpBase) -> list[int]:
        """The SM counts at which ``op`` is swept, ascending."""
        return sorted(op.sm_counts or self.target.all_sm_counts)

    @property
    def all_sm_counts(self) -> list[int]:
        """The SM counts at which any op is swept, ascending; the target's if there are no ops."""
        return sorted({count for op in self.ops for count in self.sm_counts_of(op)}) or self.target.all_sm_counts


class _RefusedOp(ValueError):
    """An error in one op, by its position in the manifest."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.index = index


def load(path: Path) -> tuple[Manifest, bytes]:
    """Read a manifest file; returns the manifest and the file's bytes.

    Raises:
        ManifestError: the file cannot be read, is not YAML, or holds wrong values. Each wrong value is listed with its
            file, line and field, what was wanted and what was found.
    """
    try:
        data = read_named(path, MAX_BYTES)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(data, str(path)), data


def parse(data: bytes, name: str = "manifest") -> Manifest:
    """Read a manifest from bytes. Raises what `load` raises.

    Args:
        name: stands for the file in error messages.
    """
    try:
        tree = reader.read(data)
    except TextError as error:
        raise ManifestError(f"{name}:{error.line}: {error}") from None
    if not isinstance(tree.value, dict):
        raise ManifestError(
            f"{name}: wanted a mapping with name, target, max_tokens and ops, found {_show(tree.value)}"
        )
    try:
        return Manifest.model_validate(tree.value)
    except ValidationError as error:
        lines = [f"{name}:{tree.line(location)}: {why}" for location, why in map(_describe, error.errors())]
        raise ManifestError("\n".join(lines)) from None


def _describe(error: Any) -> tuple[tuple[Any, ...], str]:
    """A pydantic error's location, and what is wrong there, in our words."""
    loc, kind, context = error["loc"], error["type"], error.get("ctx", {})
    field = _field(loc)
    if kind == "extra_forbidden":
        fields = _fields_at(loc)
        return loc, f"{field}: unknown field{_suggestion(loc[-1], fields)} (known here: {', '.join(fields)})"
    if kind == "missing":
        return loc, f"{field}: missing"
    if kind == "union_tag_not_found":
        return loc, f"{field}.op: missing; wanted one of {', '.join(OPS)}"
    if kind == "union_tag_invalid":
        tag = context["tag"]
        return loc, f"{field}.op: wanted one of {', '.join(OPS)}, found {tag!r}{_suggestion(tag, OPS)}"
    if kind == "value_error":
        inner = context["error"]
        if isinstance(inner, _RefusedOp):
            return ("ops", inner.index), f"ops[{inner.index}]: {inner}"
        return loc, f"{field}: {inner}"
    requirement = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return loc, f"{field}: wanted {requirement}, found {_show(error['input'])}"


def _suggestion(word: object, known: Iterable[str]) -> str:
    """``; did you mean …?`` if a known word is close; else an empty text."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _field(loc: tuple[Any, ...]) -> str:
    """A location as a person writes it, for example ``ops[1].k``."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in OPS:  # the union's tag is not in the file
            text += f".{part}" if text else str(part)
    text = one_line(text)
    return text or "manifest"


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    """The fields that may stand beside the one at ``loc``."""
    if loc[0] == "ops" and len(loc) > 2:
        return list(OPS[loc[2]].model_fields)
    models: dict[str, type[BaseModel]] = {
        "target": Target,
        "gpu": gpus.Gpu,
        "toolchain": Toolchain,
        "flashinfer": FlashInferNeeds,
    }
    if loc[0] == "flashinfer" and len(loc) > 3:
        return list(Gemm.model_fields)
    if loc[0] == "sources":
        return list(Source.model_fields)
    parent = models.get(str(loc[-2])) if len(loc) > 1 else None
    return list((parent or Manifest).model_fields)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
