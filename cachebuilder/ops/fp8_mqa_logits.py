"""``fp8_mqa_logits``: the indexer's logits of a prefill in FP8, as SGLang calls it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from cachebuilder.ops.fp8_fp4_mqa_logits import Fp8Fp4MqaLogits


class Fp8MqaLogits(Fp8Fp4MqaLogits):
    """As `Fp8Fp4MqaLogits`, of FP8 with float32 scales; logits are float32."""

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2 and vLLM 0.25.0's copy"

    op: Literal["fp8_mqa_logits"]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _check_plain(self) -> Fp8MqaLogits:
        if self.format or self.scales or self.weights or self.logits:
            raise ValueError("format, scales, weights and logits are fp8_fp4_mqa_logits' to choose")
        return self

    def arguments(self, q: Any, scales: Any) -> Any:
        """Q alone."""
        return q
