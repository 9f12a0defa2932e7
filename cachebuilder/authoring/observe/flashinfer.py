"""What an observed engine takes from FlashInfer."""

from __future__ import annotations

from cachebuilder.authoring.observe.calls import Observed
from cachebuilder.flashinfer.entries import GEMM_MODULE
from cachebuilder.flashinfer.schema import FlashInferNeeds, Gemm


def flashinfer_needs(observed: Observed) -> FlashInferNeeds | None:
    """The modules that FlashInfer would have compiled, and each shape that its GEMM was called with.

    An engine may call FlashInfer for small M, and DeepGEMM from some M on. The requests cannot show where it switches,
    but between which two values. So M goes up to the one below DeepGEMM's smallest in requests. Where DeepGEMM was not
    called for this shape, M goes to the tokens of one step.
    """
    gemms = []
    for (n, k), largest in sorted(observed.flashinfer_gemms.items()):
        least = [
            op.least
            for op in observed.ops
            if op.name == "fp8_gemm_nt" and (op.fields["n"], op.fields["k"]) == (n, k) and op.least is not None
        ]
        bound = min(least) - 1 if least else observed.facts.max_num_batched_tokens or 0
        gemms.append(Gemm(n=n, k=k, max_m=max(largest, bound)))
    modules = [name for name in observed.flashinfer_modules if name != GEMM_MODULE]
    return FlashInferNeeds(modules=modules, gemms=gemms) if modules or gemms else None


def missing_needs(needs: FlashInferNeeds | None, known: FlashInferNeeds | None) -> FlashInferNeeds:
    """What of ``needs`` is not in ``known``."""
    known = known or FlashInferNeeds()
    bounds = {(gemm.n, gemm.k): gemm.max_m for gemm in known.gemms}
    return FlashInferNeeds(
        modules=[name for name in needs.modules if name not in known.modules] if needs else [],
        gemms=[gemm for gemm in needs.gemms if gemm.max_m > bounds.get((gemm.n, gemm.k), 0)] if needs else [],
    )
