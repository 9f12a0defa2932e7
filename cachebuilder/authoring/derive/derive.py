"""A model's layers and an engine's rules joined: the ops of one rank, each with its layers and its arithmetic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from cachebuilder.authoring.derive import families
from cachebuilder.authoring.derive.config import BLOCK, Config, check_block_fp8
from cachebuilder.authoring.derive.layers import Experts, LeftOut, Linear, Model, Part, numbers_text
from cachebuilder.authoring.derive.serving import Serving, knows
from cachebuilder.errors import ModelError
from cachebuilder.ops.catalog import OPS, OpBase

#: What DeepGEMM's callers ask of N and K: ``should_use_deepgemm_for_fp8_linear`` (vllm/utils/deep_gemm.py, 0.25.0 and
#: 0.33.0) and ``_deepgemm_block_fp8_supported`` (srt/layers/quantization/fp8_utils.py, SGLang 0.5.23).
_N_MULTIPLE, _K_MULTIPLE = 64, BLOCK


@dataclass(frozen=True)
class DerivedOp:
    """One op of the manifest, and one line for each layer that it serves."""

    op: OpBase
    serves: tuple[str, ...]


@dataclass(frozen=True)
class Derived:
    """What a manifest is written from.

    Attributes:
        quantization: how the checkpoint says that it is block FP8.
        unknown: what could not be told from the config.
    """

    ops: tuple[DerivedOp, ...]
    left_out: tuple[LeftOut, ...]
    unknown: tuple[str, ...]
    quantization: str


def derive(config: Config, serving: Serving) -> Derived:
    """The ops that ``serving`` asks DeepGEMM for.

    Raises:
        ModelError: the engine would not send this model to DeepGEMM, or not load it when cut like this; says why.
    """
    try:
        return _derive(config, serving)
    except ValidationError as error:  # a size that no op of a manifest can have
        first = error.errors()[0]
        field, wanted = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Input should be ")
        raise ModelError(
            f"{config.path}: {error.title}: {field}: wanted {wanted}, found {first['input']!r}",
            hint="a number in the config, or a size on the command line, is out of all proportion",
        ) from None


def _derive(config: Config, serving: Serving) -> Derived:
    quantization = check_block_fp8(config)
    serving.check(config)
    model = families.describe(config, serving)
    found: list[tuple[OpBase, str]] = []
    left_out: list[LeftOut] = []
    for linear in model.linears:
        layers = _converted(
            config, serving, linear.module, [part.name for part in linear.parts], linear.layers, left_out
        )
        if layers:
            _add_linear(found, left_out, linear, layers, serving)
    has_experts = bool(model.experts)
    for experts in model.experts:
        if layers := _converted(config, serving, experts.module, [experts.module], experts.layers, left_out):
            if serving.mega_moe:
                model.calls += serving.mega_moe_calls(replace(experts, layers=layers))
            else:
                _add_experts(found, left_out, experts, layers, serving)
    if serving.mega_moe and not any(call.op.endswith("_mega_moe") for call in model.calls):
        raise ModelError(
            f"{config.path}: --moe-backend deep_gemm_mega_moe: wanted routed experts that are quantised, found none in "
            f"{config.architecture}",
            hint="leave --moe-backend out",
        )
    if not found:  # what the model calls besides would not need a cache of its own
        raise ModelError(
            f"{config.path}: nothing of {config.architecture} reaches DeepGEMM: "
            + "; ".join(f"{item.what}: {item.why}" for item in left_out),
            hint="there is no DeepGEMM cache to build for it",
        )
    for call in model.calls:
        why: str | None = families.NOT_AN_OP
        if knows(call.op, *call.fields):
            op = OPS[call.op].model_validate({"op": call.op, **call.fields})
            why = op.unsupported(serving.gpu.major)
            if why is None:
                found.append((op, call.what))
                continue
        shown = ", ".join(f"{name} {value}" for name, value in call.fields.items())
        left_out.append(LeftOut(f"{call.op} ({shown}; {call.what})", str(why)))
    left_out += model.left_out + serving.left_out(config, has_experts)
    return Derived(tuple(_joined(found)), tuple(_distinct(left_out)), tuple(model.unknown), quantization)


def _converted(
    config: Config,
    serving: Serving,
    module: str,
    names: Sequence[str],
    layers: Sequence[int],
    left_out: list[LeftOut],
) -> tuple[int, ...]:
    """The layers in which the module is quantised; the others are noted.

    Raises:
        ModelError: some but not all weights of a fused module are quantised in a layer: the engines refuse to load
            that (``is_layer_skipped``: vLLM 0.33.0 ``layers/quantization/utils/quant_utils.py``, SGLang 0.5.23 alike).
    """
    if not config.unconverted:
        return tuple(layers)
    quantized: list[int] = []
    kept: list[int] = []
    for number in layers:
        skipped = {name for name in names if serving.keeps_unquantized(config, f"model.layers.{number}.{name}")}
        if skipped and len(skipped) < len(set(names)):
            raise ModelError(
                f"{config.path}: layer {number}'s {module} is fused: wanted all or none of its weights quantised, "
                f"found {', '.join(sorted(skipped))} unquantised"
            )
        (kept if skipped else quantized).append(number)
    if kept:
        left_out.append(LeftOut(f"{module} in layers {numbers_text(kept)}", "the checkpoint keeps it unquantised"))
    return tuple(quantized)


def _add_linear(
    found: list[tuple[OpBase, str]],
    left_out: list[LeftOut],
    linear: Linear,
    layers: Sequence[int],
    serving: Serving,
) -> None:
    n = sum(_rows(part, linear, serving) for part in linear.parts)
    k = _share(linear.k, linear.ranks, f"{linear.module}: K", linear.k_how) if linear.split == "k" else linear.k
    _check_blocks(linear, k, serving)
    if n % _N_MULTIPLE or k % _K_MULTIPLE:
        why = f"N {n}, K {k}: {serving.name} wants N a multiple of {_N_MULTIPLE} and K of {_K_MULTIPLE} for DeepGEMM"
        left_out.append(LeftOut(f"{linear.module} in layers {numbers_text(layers)}", why))
        return
    fields: dict[str, object] = {"op": "fp8_gemm_nt", "n": n, "k": k}
    if linear.tokens is not None and linear.tokens > serving.largest_m:
        fields["max_tokens"] = linear.tokens
    text = f"{linear.module}, layers {numbers_text(layers)}: {_linear_arithmetic(linear, n, k)}"
    found.append((OPS["fp8_gemm_nt"].model_validate(fields), f"{text}. {linear.note}" if linear.note else text))
    if linear.beside:
        tokens, sms = linear.beside
        fields |= {"max_tokens": min(tokens, serving.largest_m), "sm_counts": [sms]}
        text += f". Beside other work up to {tokens} tokens: {sms} of {serving.gpu.sm_count} SMs"
        found.append((OPS["fp8_gemm_nt"].model_validate(fields), text))


def _rows(part: Part, linear: Linear, serving: Serving) -> int:
    """A part's rows on one rank."""
    if linear.split != "n" or linear.ranks == 1:
        return part.n
    if part.least and part.n < part.least * linear.ranks:
        if linear.ranks % (part.n // part.least):
            raise ModelError(
                f"{part.name}: wanted ranks that its {part.n // part.least} heads divide, found {linear.ranks}"
            )
        return part.least
    return _share(part.n, linear.ranks, f"{part.name}: N", part.how)


def _share(whole: int, ranks: int, what: str, how: str) -> int:
    if whole % ranks:
        raise ModelError(f"{what} = {how} = {whole}: wanted a multiple of the {ranks} ranks that share it")
    return whole // ranks


def _check_blocks(linear: Linear, k: int, serving: Serving) -> None:
    """Both engines load block scales only where a cut falls between blocks.

    ``validate_fp8_block_shape``: vLLM 0.33.0 ``layers/quantization/utils/fp8_utils.py`` (0.25.0 the same), SGLang
    0.5.23 ``srt/layers/quantization/fp8_utils.py``. Of a fused layer that is not cut, the last weight may
    end within a block.
    """
    cut = linear.split == "n" and linear.ranks > 1
    for part in linear.parts if cut else linear.parts[:-1]:
        rows = _rows(part, linear, serving)
        if rows % BLOCK:
            raise _refused_cut(part.name, "N", part.how, part.n, linear.ranks if cut else 1, rows)
    if linear.split == "k" and linear.ranks > 1 and k % BLOCK:
        raise _refused_cut(linear.module, "K", linear.k_how, linear.k, linear.ranks, k)


def _refused_cut(what: str, axis: str, how: str, whole: int, ranks: int, found: int) -> ModelError:
    shown = f"{whole} / {ranks} = {found}" if ranks > 1 else f"{found}"
    return ModelError(
        f"{what}: wanted {axis} of each rank a multiple of {BLOCK}, the checkpoint's block, found {how}: {shown}",
        hint="the engine refuses to load this, or serves it without DeepGEMM; cut it among fewer ranks",
    )


def _linear_arithmetic(linear: Linear, n: int, k: int) -> str:
    if len(linear.parts) == 2 and linear.parts[0].how == linear.parts[1].how:
        n_text = f"2 · {linear.parts[0].how}"
    else:
        n_text = " + ".join(dict.fromkeys(part.how for part in linear.parts))
        if len({part.how for part in linear.parts}) < len(linear.parts):  # K and V are alike
            n_text = f"{linear.parts[0].how} + {len(linear.parts) - 1} · {linear.parts[-1].how}"
    over = f" / {linear.ranks} ranks" if linear.ranks > 1 else ""
    n_over, k_over = (over if linear.split == axis else "" for axis in "nk")
    copied = linear.split == "n" and n != linear.n // linear.ranks
    n_shown = _term(n_text, linear.n, n_over, n)
    if copied:
        n_shown = f"{n_text}, on each of {linear.ranks} ranks with K and V heads copied: {n}"
    return f"N = {n_shown}; K = {_term(linear.k_how, linear.k, k_over, k)}"


def _term(how: str, whole: int, over: str, share: int) -> str:
    """``how = whole over = share``, without what only says again what stands before it."""
    if not re.fullmatch(rf"\w+ {whole}", how):
        how = f"{how} = {whole}"
    return f"{how}{over} = {share}" if over else how


def _add_experts(
    found: list[tuple[OpBase, str]],
    left_out: list[LeftOut],
    experts: Experts,
    layers: Sequence[int],
    serving: Serving,
) -> None:
    if not serving.moe_deep_gemm:
        left_out.append(LeftOut(f"{experts.module} in layers {numbers_text(layers)}", "--moe-backend other"))
        return
    routed = _share(experts.count, serving.ep, f"{experts.module}: experts", experts.how)
    count = routed + experts.fused
    what = f"moe_intermediate_size {experts.intermediate}"
    width = _share(experts.intermediate, serving.expert_ranks, f"{experts.module}: intermediate size", what)
    if width % BLOCK:
        # vLLM 0.25.0 refuses to load these (validate_fp8_block_shape_moe); 0.33.0 serves them with Triton, whose scales
        # may be finer, or pads them for --moe-backend deep_gemm (fused_moe/oracle/fp8.py,
        # resolve_fp8_moe_weight_block_shape). SGLang 0.5.23 refuses (quantization/fp8.py).
        raise ModelError(
            f"{experts.module}: wanted each rank's intermediate size a multiple of {BLOCK}, the checkpoint's block, "
            f"found {what} / {serving.expert_ranks} = {width}",
            hint="cut the experts among fewer ranks (--ep), or give --moe-backend other for the other layers alone",
        )
    over = f" / ep {serving.ep} = {routed}" if serving.ep > 1 else ""
    if experts.fused:
        over += (
            f" + {experts.fused} (the shared expert, fused in), top-k {experts.topk - experts.fused} + {experts.fused}"
        )
    cut = f" / {serving.expert_ranks} ranks" if serving.expert_ranks > 1 else ""
    where = f"layers {numbers_text(layers)}"
    n13, k2 = f"N = 2 · {what}{cut} = {2 * width}", _term(what, experts.intermediate, cut, width)
    hidden = f"hidden_size {experts.hidden}"
    for name, n, k, shape in (
        ("w13 (gate and up)", 2 * width, experts.hidden, f"{n13}; K = {hidden}"),
        ("w2 (down)", experts.hidden, width, f"N = {hidden}; K = {k2}"),
    ):
        for op, how in serving.expert_ops(experts, count, n, k):
            text = f"{experts.module} {name}, {where}: {experts.how}{over}; {shape}"
            found.append((op, f"{text}; {how}" if how else text))


def _joined(found: Sequence[tuple[OpBase, str]]) -> list[DerivedOp]:
    """One op for each shape, with the largest maximum that any of its layers needs."""
    joined: dict[str, DerivedOp] = {}
    for op, text in found:
        identity = op.model_dump_json(exclude={"max_tokens", "max_m"})
        if (known := joined.get(identity)) is None:
            joined[identity] = DerivedOp(op, (text,))
            continue
        largest = {
            name: max(given)
            for name in ("max_tokens", "max_m")
            if (given := [value for item in (known.op, op) if (value := getattr(item, name, None)) is not None])
        }
        joined[identity] = DerivedOp(known.op.model_copy(update=largest), (*known.serves, text))
    return list(joined.values())


def _distinct(items: Sequence[LeftOut]) -> list[LeftOut]:
    return list(dict.fromkeys(items))


__all__ = ["Derived", "DerivedOp", "Model", "derive"]
