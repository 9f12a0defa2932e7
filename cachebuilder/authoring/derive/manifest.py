"""From a model's config and a deployment to a manifest, in one call."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import Derived, derive
from cachebuilder.authoring.derive.engines import ENGINES
from cachebuilder.authoring.derive.flashinfer import flashinfer_needs
from cachebuilder.authoring.derive.serving import EngineOptions, Serving
from cachebuilder.authoring.derive.text import manifest_text
from cachebuilder.cuda import gpus
from cachebuilder.errors import ModelError
from cachebuilder.manifest import schema as manifests

MoeBackend = Literal["deep_gemm", "deep_gemm_mega_moe", "other"]
MOE_BACKENDS: tuple[MoeBackend, ...] = get_args(MoeBackend)


@dataclass(frozen=True, kw_only=True)
class Deployment(EngineOptions):
    """How a person describes a deployment.

    Attributes:
        engine: one of `ENGINES`.
        engine_version: None: the newest whose source was read.
        moe_backend: whose kernels run the routed experts, in vLLM's words; ``other``: not DeepGEMM's.
        with_flashinfer: also what the engine takes from FlashInfer.
        engine_arguments: further options and variables of the engine that bear on shapes, as it takes them.
        allow_unread: write the manifest although no rule reads a field of the config that may bear on shapes.
    """

    engine: str
    engine_version: str | None = None
    gpu: str
    moe_backend: MoeBackend = "deep_gemm"
    with_flashinfer: bool = False
    engine_arguments: tuple[str, ...] = ()
    allow_unread: bool = False

    def serving(self) -> Serving:
        """The engine's rules for this deployment.

        Raises:
            ModelError: no such GPU is known, the rules do not cover the engine's release, or not one of its options.
        """
        rules = ENGINES[self.engine]
        try:
            gpu = gpus.find(self.gpu)
        except ValueError as error:
            raise ModelError(f"--gpu: {error}") from None
        return rules(
            gpu=gpu,
            version=rules.release(self.engine_version),
            moe_deep_gemm=self.moe_backend != "other",
            mega_moe=self.moe_backend == "deep_gemm_mega_moe",
            switches=rules.known.switches(self.engine_arguments),
            **{field.name: getattr(self, field.name) for field in fields(EngineOptions)},
        )


@dataclass(frozen=True)
class DerivedManifest:
    """A manifest's text, and what it was written from."""

    text: str
    config: Config
    serving: Serving
    derived: Derived


def derive_manifest(model: Path, deployment: Deployment, name: str | None = None) -> DerivedManifest:
    """Write the manifest of the model at ``model``, a ``config.json`` or its folder.

    Args:
        name: the manifest's; None: from the model's folder, the ranks, the GPU and the engine.

    Raises:
        ModelError: the config cannot be read, the engine would not serve the model with DeepGEMM like this, or no rule
            reads a field that may bear on shapes.
        ManifestError: ``name`` is no name for a manifest.
    """
    config, serving = Config.read(model), deployment.serving()
    derived = derive(config, serving)
    if derived.unread and not deployment.allow_unread:
        raise ModelError(
            f"{config.path}: wanted only fields that a rule reads or that no shape depends on, found "
            f"{', '.join(derived.unread)}: the manifest of {config.architecture} may lack shapes",
            hint="observe the engine (cachebuilder observe), record it (cachebuilder record), or go on with "
            "--allow-unread: the manifest then names these fields",
        )
    needs = flashinfer_needs(config, serving, derived) if deployment.with_flashinfer else None
    text = manifest_text(config, serving, derived, name, needs)
    manifests.parse(text.encode(), "the written manifest")
    return DerivedManifest(text, config, serving, derived)
