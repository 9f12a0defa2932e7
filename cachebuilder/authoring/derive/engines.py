"""The engines whose rules are known: which of a model's GEMMs each one sends to DeepGEMM.

config.json ──► config ──► families ──► derive ──► text
                (fields)   (layers of   (ops of    (the commented
                            a model)     a rank)    manifest)

`families` and `derive` both ask the rules of the engine: `vllm` or `sglang`, whose questions `serving` states.
"""

from __future__ import annotations

from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.sglang import Sglang
from cachebuilder.authoring.derive.vllm import Vllm

#: engine name → its rules.
ENGINES: dict[str, type[Serving]] = {"vllm": Vllm, "sglang": Sglang}
