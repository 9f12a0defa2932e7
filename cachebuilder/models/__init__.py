"""From a model's ``config.json`` to a manifest: which GEMMs an engine asks DeepGEMM for, with which shapes.

    config.json ──► config ──► families ──► shards ──► ops ──► text
                               (layers)     (a rank's   (vllm, sglang:
                                             N and K)    what goes to DeepGEMM, over which M)

`config` reads the file and the checkpoint's quantisation, `families` knows each architecture's layers, `vllm` and
`sglang` the rules of an engine, `derive` joins them into ops, `text` writes the commented manifest.
"""

from __future__ import annotations

from cachebuilder.models.config import Config
from cachebuilder.models.derive import Derived, derive
from cachebuilder.models.serving import Serving
from cachebuilder.models.sglang import Sglang
from cachebuilder.models.text import manifest_text
from cachebuilder.models.vllm import Vllm

#: engine name → its rules.
ENGINES: dict[str, type[Serving]] = {"vllm": Vllm, "sglang": Sglang}

__all__ = ["ENGINES", "Config", "Derived", "Serving", "derive", "manifest_text"]
