"""From a model's config and a deployment to a manifest, in one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import Derived, derive
from cachebuilder.authoring.derive.engines import ENGINES
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.text import manifest_text
from cachebuilder.cuda import gpus
from cachebuilder.errors import ModelError
from cachebuilder.manifest import schema as manifests

MoeBackend = Literal["deep_gemm", "deep_gemm_mega_moe", "other"]
MOE_BACKENDS: tuple[MoeBackend, ...] = get_args(MoeBackend)


@dataclass(frozen=True)
class Deployment:
    """How a person describes a deployment; `serving` finds the engine's rules for it.

    Attributes:
        engine: one of `ENGINES`.
        engine_version: its release; None: the newest whose source was read.
        gpu: a known GPU's name.
        moe_backend: whose kernels run the routed experts, in vLLM's words; ``other``: not DeepGEMM's.

    The other fields are `Serving`'s.
    """

    engine: str
    gpu: str
    engine_version: str | None = None
    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    max_tokens: int = 8192
    max_seqs: int = 1024
    max_model_len: int | None = None
    moe_backend: MoeBackend = "deep_gemm"
    low_latency: bool = False

    def serving(self) -> Serving:
        """The engine's rules for this deployment.

        Raises:
            ModelError: no such GPU is known, or the rules do not reach back to the engine's release.
        """
        rules = ENGINES[self.engine]
        try:
            gpu = gpus.find(self.gpu)
        except ValueError as error:
            raise ModelError(f"--gpu: {error}") from None
        return rules(
            gpu=gpu,
            version=rules.release(self.engine_version),
            tp=self.tp,
            ep=self.ep,
            dp=self.dp,
            pp=self.pp,
            max_tokens=self.max_tokens,
            max_seqs=self.max_seqs,
            max_model_len=self.max_model_len,
            low_latency=self.low_latency,
            moe_deep_gemm=self.moe_backend != "other",
            mega_moe=self.moe_backend == "deep_gemm_mega_moe",
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
        ModelError: the config cannot be read, or the engine would not serve the model with DeepGEMM like this.
        ManifestError: ``name`` is no name for a manifest.
    """
    config, serving = Config.read(model), deployment.serving()
    derived = derive(config, serving)
    text = manifest_text(config, serving, derived, name)
    manifests.parse(text.encode(), "the written manifest")
    return DerivedManifest(text, config, serving, derived)
