"""``fleet.yaml``: models × GPUs × engines × servings, and the store that the builders share."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cachebuilder.authoring.derive.manifest import MoeBackend
from cachebuilder.common.reading import read_named
from cachebuilder.common.records import one_line
from cachebuilder.cuda import gpus
from cachebuilder.errors import ManifestError
from cachebuilder.manifest import reader

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Size = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=1, le=1 << 20)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(_Model):
    """Where a model's shapes come from: its config, or a manifest that was written or observed before."""

    config: Annotated[
        str | None, Field(description="a config.json or its folder, from which manifests are derived")
    ] = None
    manifest: Annotated[
        str | None, Field(description="a manifest; {gpu}, {engine} and {serving} stand for the cell's names")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Source:
        if (self.config is None) == (self.manifest is None):
            raise ValueError("wanted either config or manifest")
        return self


class Engine(_Model):
    """An engine's release, and the environment whose torch, DeepGEMM and nvcc serve.

    At most one of ``python``, ``lock`` and ``image`` names the environment; without one it is this Python's own.
    """

    engine: Annotated[Literal["vllm", "sglang"], Field(description="whose rules derive a manifest from a config")]
    version: Annotated[str | None, Field(description="the release; default: the newest whose rules were read")] = None
    python: Annotated[str | None, Field(description="the interpreter of an environment that exists")] = None
    lock: Annotated[str | None, Field(description="a requirements file with hashes, from which uv makes it")] = None
    image: Annotated[str | None, Field(description="an image; builders run in it and are given --engine NAME")] = None
    deep_gemm: Annotated[str | None, Field(description="the deep_gemm package; default: the environment's")] = None
    flashinfer: Annotated[str | None, Field(description="the flashinfer package; default: the environment's")] = None
    nvcc: Annotated[str | None, Field(description="the compiler; default: the environment's")] = None

    @model_validator(mode="after")
    def _check(self) -> Engine:
        named = [name for name in ("python", "lock", "image") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"wanted one of python, lock and image, found {' and '.join(named)}")
        return self


class Serving(_Model):
    """How models are served; the fields are options of ``cachebuilder manifest``."""

    tp: Size = 1
    ep: Size = 1
    dp: Size = 1
    pp: Size = 1
    max_tokens: Tokens = 8192
    max_seqs: Size = 1024
    max_model_len: Size | None = None
    low_latency: bool = False
    moe_backend: MoeBackend = "deep_gemm"
    with_flashinfer: bool = False
    engine_arguments: list[str] = []
    allow_unread: bool = False


class Pattern(_Model):
    """Cells by their names: each field is one name or several, and a field that is left out fits all."""

    model: str | list[str] | None = None
    gpu: str | list[str] | None = None
    engine: str | list[str] | None = None
    serving: str | list[str] | None = None

    def fits(self, names: Mapping[str, str | None]) -> bool:
        """Whether it fits the cell with these names."""
        return all(
            wanted is None or names[part] in (wanted if isinstance(wanted, list) else [wanted])
            for part, wanted in self.model_dump().items()
        )


class Included(_Model):
    """One cell to add to the matrix."""

    model: str
    gpu: str
    engine: str
    serving: str | None = None


class Fleet(_Model):
    """A whole fleet: every model × GPU × engine × serving is a cell, less ``exclude``, plus ``include``."""

    schema_version: Literal[1] = 1
    name: Annotated[Name, Field(description="names the records in the store, and the tags that `pack` pushes")]
    store: Annotated[str, Field(min_length=1, description="s3://…, gs://…, file:///… or a folder")]
    models: Annotated[dict[Name, Source], Field(min_length=1)]
    gpus: Annotated[list[str], Field(min_length=1, description="names that `cachebuilder gpus` lists")]
    engines: Annotated[dict[Name, Engine], Field(min_length=1)]
    serving: Annotated[dict[Name, Serving], Field(description="how the models with a config are served")] = {}
    include: list[Included] = []
    exclude: list[Pattern] = []

    @model_validator(mode="after")
    def _check_names(self) -> Fleet:
        for name in [*self.gpus, *(cell.gpu for cell in self.include)]:
            gpus.find(name)
        known: dict[str, list[str]] = {
            "model": list(self.models),
            "gpu": list(dict.fromkeys([*self.gpus, *(cell.gpu for cell in self.include)])),
            "engine": list(self.engines),
            "serving": list(self.serving),
        }
        listed: list[tuple[str, BaseModel]] = [(f"include[{i}]", cell) for i, cell in enumerate(self.include)]
        listed += [(f"exclude[{i}]", pattern) for i, pattern in enumerate(self.exclude)]
        for where, cell in listed:
            for part, value in cell.model_dump(exclude_none=True).items():
                for name in value if isinstance(value, list) else [value]:
                    if name not in known[part]:
                        raise ValueError(f"{where}.{part}: wanted one of {', '.join(known[part])}, found {name!r}")
        if not self.serving and any(source.config for source in self.models.values()):
            raise ValueError("serving: missing; a model with a config needs one")
        return self


def load(path: Path) -> Fleet:
    """Read ``fleet.yaml``.

    Raises:
        ManifestError: it cannot be read, is not YAML, or holds wrong values. Each wrong value is listed with its file,
            line and field, what was wanted and what was found.
    """
    try:
        tree = reader.read(read_named(path, reader.MAX_BYTES))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from error
    except reader.TextError as error:
        raise ManifestError(f"{path}:{error.line}: {error}") from None
    if not isinstance(tree.value, dict):
        raise ManifestError(f"{path}: wanted a mapping with name, store, models, gpus, engines and serving")
    try:
        return Fleet.model_validate(tree.value)
    except ValidationError as error:
        lines = [f"{path}:{tree.line(wrong['loc'])}: {_why(wrong)}" for wrong in error.errors()]
        raise ManifestError("\n".join(lines)) from None


def _why(error: Any) -> str:
    """A pydantic error in our words."""
    location = [str(part) for part in error["loc"]]
    field = one_line(".".join(location)) or "the fleet"
    if error["type"] == "extra_forbidden":
        known = list(_model_at(location).model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        return f"{field}: unknown field{guess} (known here: {', '.join(known)})"
    if error["type"] == "missing":
        return f"{field}: missing"
    if error["type"] == "value_error":
        return f"{field}: {error['ctx']['error']}"
    wanted = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{field}: wanted {wanted}, found {repr(error['input'])[:60]}"


def _model_at(location: list[str]) -> type[BaseModel]:
    """The model whose unknown field is at ``location``."""
    models: dict[str, type[BaseModel]] = {
        "models": Source,
        "engines": Engine,
        "serving": Serving,
        "include": Included,
        "exclude": Pattern,
    }
    return models.get(location[0], Fleet) if len(location) > 1 else Fleet
