"""The engines whose rules are known: which of a model's GEMMs each one sends to DeepGEMM.

config.json ──► config ──► families ──► layers ──► vllm, sglang ──► derive ──► text
(read)     (a model's   (a rank's  (what goes to    (joined    (the commented
layers)      N and K)   DeepGEMM)        into ops)  manifest)
"""

from __future__ import annotations

from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.sglang import Sglang
from cachebuilder.authoring.derive.vllm import Vllm

#: engine name → its rules.
ENGINES: dict[str, type[Serving]] = {"vllm": Vllm, "sglang": Sglang}
