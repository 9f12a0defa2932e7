"""Writes the manifest: YAML in which comments above each op name its layers and give the arithmetic of its shape."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import Derived
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.flashinfer_text import flashinfer_lines
from cachebuilder.common.version import __version__
from cachebuilder.flashinfer.schema import FlashInferNeeds
from cachebuilder.ops.catalog import OpBase

_WIDTH = 120


def manifest_text(
    config: Config,
    serving: Serving,
    derived: Derived,
    name: str | None = None,
    flashinfer: FlashInferNeeds | None = None,
) -> str:
    """The manifest as text. ``name`` defaults to the model's folder, the ranks, the GPU and the engine.

    Equal inputs give equal texts: there is no time and no path of this machine in it.
    """
    size = f"tp {serving.tp}, ep {serving.ep}, dp {serving.dp}, pp {serving.pp}"
    lines = [
        *_comment(
            f"{config.architecture} ({model_name(config)}), {serving.name} {serving.version}, {serving.gpu.name}, "
            f"{size}: the shapes of one rank, written by cachebuilder {__version__} from config.json."
        ),
        "#",
        *_comment(f"Checkpoint: {derived.quantization}."),
    ]
    has_experts = any("experts" in item.op.model_dump() for item in derived.ops)
    for sentence in (_scales(serving), *serving.header, serving.moe_rule if has_experts else ""):
        lines += _comment(sentence) if sentence else []
    if serving.pp > 1:
        lines += _comment(f"The layers of all {serving.pp} pipeline stages; each stage asks for some of them.")
    left_out = [f"{item.what}: {item.why}" for item in derived.left_out]
    not_read = [
        f"{name}: no rule here reads it, and shapes may depend on it (--allow-unread)" for name in derived.unread
    ]
    for title, items in (
        ("Not read in the config", not_read),
        ("Not known", derived.unknown),
        ("Not in this manifest", left_out),
    ):
        if items:
            lines += ["#", f"# {title}:"]
            for sentence in items:
                lines += _comment(f"- {sentence}.", indent="  ")
    lines += [
        f"name: {name or default_name(config, serving)}",
        f"target: {{gpu: {serving.gpu.name}{f', sm_counts: {list(serving.sm_counts)}' if serving.sm_counts else ''}}}",
        f"max_tokens: {serving.largest_m}",
        "ops:",
    ]
    for item in derived.ops:
        for text in item.serves:
            lines += ["  " + line for line in _comment(text, indent="  ", width=_WIDTH - 2)]
        lines.append(f"  - {_flow(item.op)}")
    if flashinfer:
        lines += flashinfer_lines(flashinfer)
    return "\n".join(lines) + "\n"


def default_name(config: Config, serving: Serving) -> str:
    """``<model>-tp8-h200-vllm``, with ep and dp where they are not 1."""
    sizes = "".join(
        f"-{option}{size}" for option, size in (("tp", serving.tp), ("ep", serving.ep), ("dp", serving.dp)) if size > 1
    )
    text = f"{model_name(config)}{sizes}-{serving.gpu.name}-{serving.name}".lower()
    return re.sub(r"[^a-z0-9._-]+", "-", text).strip("-._")[:100]


def model_name(config: Config) -> str:
    """The name of the folder that holds the config; the model's type where that name has no letter."""
    folder = config.path.resolve().parent.name if config.path.name == "config.json" else config.path.stem
    return folder if re.search(r"[A-Za-z]", folder) else str(config.fields.get("model_type", "model"))


def _scales(serving: Serving) -> str:
    """The format of scales: vLLM 0.33.0 utils/deep_gemm.py, DeepGemmQuantScaleFMT; SGLang 0.5.23 configurer.py."""
    if serving.gpu.major == 9:
        return "SM90: float32 scales, 1 × 128 for activations and 128 × 128 for weights."
    return "SM100 and SM120: UE8M0 scales, packed four to an int32, from blocks of 128."


def _flow(op: OpBase) -> str:
    """An op as a YAML flow mapping, without the fields that have their defaults."""
    fields = op.model_dump(exclude_defaults=True)
    texts = (f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in fields.items())
    return "{" + ", ".join(texts) + "}"


def _comment(text: str, indent: str = "", width: int = _WIDTH) -> Sequence[str]:
    """Lines of YAML comments, those after the first indented by ``indent``."""
    wrapper = textwrap.TextWrapper(width, "# ", f"# {indent}", break_long_words=False, break_on_hyphens=False)
    # A model's config may hold a character that ends a line of YAML, and so the comment.
    return wrapper.wrap("".join(c if c.isprintable() else " " for c in text))
