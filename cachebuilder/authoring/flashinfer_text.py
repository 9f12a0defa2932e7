"""The part of a manifest that says what an engine takes from FlashInfer."""

from __future__ import annotations

from cachebuilder.flashinfer.schema import FlashInferNeeds


def flashinfer_lines(needs: FlashInferNeeds) -> list[str]:
    """The manifest's ``flashinfer``, with what it is for."""
    lines = ["# What FlashInfer would compile in the serving process: modules, and kernels of linear layers by shape."]
    lines.append("flashinfer:")
    if needs.modules:
        lines.append(f"  modules: [{', '.join(needs.modules)}]")
    if needs.gemms:
        lines.append("  gemms:")
        for gemm in needs.gemms:
            fields = gemm.model_dump(exclude_defaults=True)
            lines.append("    - {" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}")
    return lines
