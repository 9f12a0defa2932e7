"""The cells of a fleet: what is served where, and the manifest of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from cachebuilder.authoring.derive.manifest import Deployment, derive_manifest
from cachebuilder.cuda import gpus
from cachebuilder.errors import ManifestError, ModelError
from cachebuilder.fleet.schema import Fleet, Source
from cachebuilder.manifest import schema as manifests
from cachebuilder.manifest.schema import Manifest


@dataclass(frozen=True)
class Cell:
    """One model on one GPU in one engine, served in one way.

    Attributes:
        serving: None for a model whose manifest does not depend on it.
        text: the manifest as a build reads it.
        manifest: the manifest, read; None if the cell cannot be built.
        refusal: why it cannot be built; None if it can.
    """

    model: str
    gpu: str
    engine: str
    serving: str | None
    text: str = ""
    manifest: Manifest | None = None
    refusal: str | None = None

    @property
    def name(self) -> str:
        """Names the cell, its manifest and its artifact."""
        return "-".join(filter(None, (self.model, self.serving, self.gpu, self.engine)))


def expand(fleet: Fleet, folder: Path) -> list[Cell]:
    """Every cell of the matrix with its manifest, in the matrix's order, and then those of ``include``.

    Args:
        folder: what relative paths of the fleet begin at.
    """
    names: dict[tuple[str, str, str, str | None], None] = {}
    for model, engine in product(fleet.models, fleet.engines):
        source = fleet.models[model]
        for gpu in _gpus(fleet, source, engine, folder):
            for serving in fleet.serving if _depends_on_serving(source) else [None]:
                cell = {"model": model, "gpu": gpu, "engine": engine, "serving": serving}
                if not any(pattern.fits(cell) for pattern in fleet.exclude):
                    names[model, gpu, engine, serving] = None
    for included in fleet.include:
        names[included.model, gpus.find(included.gpu).name, included.engine, included.serving] = None
    return [_with_manifest(fleet, folder, Cell(*parts)) for parts in names]


def _gpus(fleet: Fleet, source: Source, engine: str, folder: Path) -> Iterator[str]:
    """The GPUs of a model's cells: the fleet's, or the one that a manifest without ``{gpu}`` is for."""
    if source.manifest is None or "{gpu}" in source.manifest or "{serving}" in source.manifest:
        yield from (gpus.find(name).name for name in fleet.gpus)
        return
    path = folder / source.manifest.replace("{engine}", engine)
    yield manifests.load(path)[0].target.gpu.name


def _depends_on_serving(source: Source) -> bool:
    return source.manifest is None or "{serving}" in source.manifest


def _with_manifest(fleet: Fleet, folder: Path, cell: Cell) -> Cell:
    source = fleet.models[cell.model]
    try:
        if source.manifest is not None:
            text, manifest = _read(folder, source.manifest, cell)
        else:
            text, manifest = _derive(fleet, folder / str(source.config), cell)
    except (ManifestError, ModelError) as error:
        return Cell(cell.model, cell.gpu, cell.engine, cell.serving, refusal=str(error))
    return Cell(cell.model, cell.gpu, cell.engine, cell.serving, text, manifest)


def _read(folder: Path, template: str, cell: Cell) -> tuple[str, Manifest]:
    for part in ("gpu", "engine", "serving"):
        template = template.replace(f"{{{part}}}", str(getattr(cell, part)))
    manifest, data = manifests.load(folder / template)
    if manifest.target.gpu.name != cell.gpu:
        raise ManifestError(f"{folder / template}: wanted a manifest for {cell.gpu}, found {manifest.target.gpu.name}")
    return data.decode(), manifest


def _derive(fleet: Fleet, config: Path, cell: Cell) -> tuple[str, Manifest]:
    if cell.serving is None:
        raise ManifestError(f"{cell.name}: wanted a serving, since its manifest is derived from {config}; found none")
    engine, serving = fleet.engines[cell.engine], fleet.serving[cell.serving]
    fields = serving.model_dump(exclude={"engine_arguments"})
    deployment = Deployment(
        engine=engine.engine,
        engine_version=engine.version,
        gpu=cell.gpu,
        engine_arguments=tuple(serving.engine_arguments),
        **fields,
    )
    text = derive_manifest(config, deployment, cell.name).text
    return text, manifests.parse(text.encode(), cell.name)
