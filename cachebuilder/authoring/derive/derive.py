"""Applies an engine's rules to a model's layers: the ops of one rank, each with its layers and its arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from cachebuilder.authoring.derive import families
from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.harmless import unread
from cachebuilder.authoring.derive.layers import Call, Experts, LeftOut, Linear, Model, Part, layers_text
from cachebuilder.authoring.derive.quantization import BLOCK, Checkpoint, read_checkpoint
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.size import Size
from cachebuilder.errors import ModelError
from cachebuilder.ops.catalog import OPS, OpBase

#: Calls that engines make for any weights: the logits of sparse attention's indexer, whose keys are in the cache.
WITHOUT_WEIGHTS = frozenset(
    {
        "fp8_mqa_logits",
        "fp8_paged_mqa_logits",
        "fp8_fp4_mqa_logits",
        "fp8_fp4_paged_mqa_logits",
        "get_paged_mqa_logits_metadata",
    }
)

#: What DeepGEMM's callers require of N and K: ``should_use_deepgemm_for_fp8_linear`` (vllm/utils/deep_gemm.py, 0.25.0
#: and 0.33.0) and ``_deepgemm_block_fp8_supported`` (srt/layers/quantization/fp8_utils.py, SGLang 0.5.23).
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
        unknown: what the config leaves open.
        unread: fields of the config that may bear on shapes and that no rule read.
    """

    ops: tuple[DerivedOp, ...]
    left_out: tuple[LeftOut, ...]
    unknown: tuple[str, ...]
    quantization: str
    unread: tuple[str, ...] = ()


def derive(config: Config, serving: Serving) -> Derived:
    """The ops that one rank of ``serving`` asks DeepGEMM for.

    Raises ModelError where the engine would not send this model to DeepGEMM, or not load it when divided like this.
    """
    try:
        return _derive(config, serving)
    except ValidationError as error:  # a size that no op of a manifest can have
        first = error.errors()[0]
        field, wanted = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Input should be ")
        raise ModelError(
            f"{config.path}: {error.title}: {field}: wanted {wanted}, found {first['input']!r}",
            hint="correct the number in the config, or the size on the command line, that this comes from",
        ) from None


def _derive(config: Config, serving: Serving) -> Derived:
    checkpoint = read_checkpoint(config, serving.name, serving.modelopt)
    serving.check(config)
    _check_known(config, checkpoint)
    try:
        model = families.describe(config, serving)
        rank = _Rank(config, serving, model, checkpoint)
        for linear in model.linears:
            rank.add_linear(linear)
    except ModelError as error:
        if families.family_of(config) is None:
            raise _not_read(config, f"it has no rule of its own, and as a plain decoder, {error}") from error
        raise
    calls = [call for call in model.calls if not checkpoint.refusal or call.op in WITHOUT_WEIGHTS]
    for experts in model.experts:
        if layers := rank.quantized_layers(experts.module, [experts.module], experts.layers):
            if serving.mega_moe:
                calls += serving.mega_moe_calls(replace(experts, layers=layers))
            else:
                rank.add_experts(replace(experts, layers=layers))
    if serving.mega_moe and not any(call.op.endswith("_mega_moe") for call in calls):
        raise ModelError(
            f"{config.path}: --moe-backend deep_gemm_mega_moe: wanted routed experts that are quantised, found none in "
            f"{config.architecture}",
            hint="leave --moe-backend out",
        )
    # Of the other calls, only those without weights are made for a model that has no FP8 layers.
    if not rank.ops and not any(call.op in WITHOUT_WEIGHTS for call in calls):
        raise ModelError(
            f"{config.path}: nothing of {config.architecture} reaches DeepGEMM: "
            + "; ".join(f"{item.what}: {item.why}" for item in rank.left_out),
            hint="there is no DeepGEMM cache to build for it",
        )
    for call in calls:
        rank.add_call(call)
    left_out = dict.fromkeys([*rank.left_out, *model.left_out, *serving.left_out(config)])
    unknown = (*model.unknown, *serving.unknown)
    not_read = unread(config, model.unused)
    if families.family_of(config) is None:
        not_read = (f"architectures ({config.architecture})", *not_read)
    return Derived(_joined(rank.ops), tuple(left_out), unknown, checkpoint.text, not_read)


def _check_known(config: Config, checkpoint: Checkpoint) -> None:
    """Raise ModelError where no rule reads this model, or none of its layers reaches DeepGEMM.

    Of a checkpoint that is not FP8 by blocks, only models with an indexer that a rule reads call DeepGEMM.
    """
    known = families.family_of(config) is not None
    kind = str(config.fields.get("model_type"))
    kind = kind if kind in families.NOT_READ else str(config.around.get("model_type"))
    if kind in families.NOT_READ or (checkpoint.refusal and not known):
        what = families.NOT_READ.get(kind) or f"it has no rule of its own, and {checkpoint.refusal}"
        raise _not_read(config, what)
    if checkpoint.refusal and not config.has("index_topk"):
        raise checkpoint.refusal


def _not_read(config: Config, what: str) -> ModelError:
    return ModelError(
        f"{config.path}: no rule here reads {config.architecture}: {what}",
        hint="observe the engine (cachebuilder observe), or record it (cachebuilder record)",
    )


class _Rank:
    """Collects the ops of one rank, each with the line of the layer that it serves, and what is left out."""

    def __init__(self, config: Config, serving: Serving, model: Model, checkpoint: Checkpoint) -> None:
        self._config, self._serving, self._model, self._checkpoint = config, serving, model, checkpoint
        self.ops: list[tuple[OpBase, str]] = []
        self.left_out: list[LeftOut] = []

    def quantized_layers(self, module: str, weights: Sequence[str], layers: Sequence[int]) -> tuple[int, ...]:
        """The layers in which ``module`` is FP8 by blocks; notes the others.

        Args:
            weights: the names of those that the module fuses; one that begins with ``mtp.`` is whole, without a layer.

        Raises:
            ModelError: some but not all weights of a fused module are quantised in a layer: the engines refuse to load
                that (``is_layer_skipped``: vLLM 0.33.0 ``layers/quantization/utils/quant_utils.py``, SGLang 0.5.23
                alike).
        """
        others: dict[str, list[int]] = {}
        for number in layers:
            reasons = {weight: self._other(number, module, weight) for weight in weights}
            if len(set(reasons.values())) > 1:
                unquantized = sorted(weight for weight, reason in reasons.items() if reason)
                raise ModelError(
                    f"{self._config.path}: layer {number}'s {module} is fused: wanted all or none of its weights "
                    f"quantised, found {', '.join(unquantized)} unquantised"
                )
            others.setdefault(next(iter(reasons.values())), []).append(number)
        quantized = others.pop("", [])
        for reason, numbers in others.items():
            self.left_out.append(LeftOut(f"{module} in {layers_text(numbers)}", reason))
        return tuple(quantized)

    def _other(self, number: int, module: str, weight: str) -> str:
        """Why a weight is not FP8 by blocks; empty where it is."""
        prefix = "" if weight.startswith("mtp.") else self._model.name(number)
        if self._model.abbreviated:
            kept = self._checkpoint.names_end(prefix + weight)
        else:
            kept = self._serving.keeps_unquantized(self._checkpoint, prefix + weight, prefix + module)
        if kept:
            return "the checkpoint keeps it unquantised"
        return self._checkpoint.other(prefix + weight)

    def add_linear(self, linear: Linear) -> None:
        """Add the GEMM of a linear layer, where its shape goes to DeepGEMM."""
        serving = self._serving
        layers = self.quantized_layers(linear.module, [part.name for part in linear.parts], linear.layers)
        if not layers:
            return
        n = sum(_rows(part, linear) for part in linear.parts)
        k = _share(linear.k, linear.ranks, f"{linear.module}: K") if linear.split == "k" else linear.k
        if not serving.skips_block_check(self._checkpoint, linear, [_rows(part, linear) for part in linear.parts]):
            _check_blocks(linear, k)
        n = serving.padded_rows(self._checkpoint, n)
        if n % _N_MULTIPLE or k % _K_MULTIPLE:
            why = (
                f"N {n}, K {k}: for DeepGEMM, {serving.name} wants N a multiple of {_N_MULTIPLE} and K of {_K_MULTIPLE}"
            )
            self.left_out.append(LeftOut(f"{linear.module} in {layers_text(layers)}", why))
            return
        fields: dict[str, object] = {"op": "fp8_gemm_nt", "n": n, "k": k}
        if linear.tokens is not None and linear.tokens > serving.largest_m:
            fields["max_tokens"] = linear.tokens
        text = f"{linear.module}, {layers_text(layers)}: {_linear_arithmetic(linear, n, k)}"
        self.ops.append((OPS["fp8_gemm_nt"].model_validate(fields), f"{text}. {linear.note}" if linear.note else text))
        if linear.beside:
            tokens, sms = linear.beside
            fields |= {"max_tokens": min(tokens, serving.largest_m), "sm_counts": [sms]}
            text += f". Beside other work up to {tokens} tokens: {sms} of {serving.gpu.sm_count} SMs"
            self.ops.append((OPS["fp8_gemm_nt"].model_validate(fields), text))

    def add_experts(self, experts: Experts) -> None:
        """Add both GEMMs of routed experts."""
        serving, intermediate = self._serving, experts.intermediate
        if not serving.moe_deep_gemm:
            self.left_out.append(LeftOut(f"{experts.module} in {layers_text(experts.layers)}", "--moe-backend other"))
            return
        routed = _share(experts.count, serving.ep, f"{experts.module}: experts")
        width = _share(intermediate, serving.ranks.expert, f"{experts.module}: intermediate size")
        padded = serving.padded_width(experts, width)
        if padded % BLOCK:
            # create_weights of Fp8MoEMethod: vLLM 0.25.0 quantization/fp8.py, SGLang 0.5.23 quantization/fp8.py.
            raise ModelError(
                f"{experts.module}: wanted each rank's intermediate size a multiple of {BLOCK}, the checkpoint's "
                f"block, found {intermediate.how} / {serving.ranks.expert} = {width}",
                hint="divide the experts among fewer ranks (--ep), or leave them out with --moe-backend other",
            )
        count = f"{experts.count.how} / ep {serving.ep} = {routed}" if serving.ep > 1 else experts.count.how
        if fused := experts.fused:
            count += f" + {fused} (the shared expert, fused in), top-k {experts.topk - fused} + {fused}"
        ranks, hidden = serving.ranks.expert, experts.hidden
        over = f" / {ranks} ranks" if ranks > 1 else ""
        if padded != width:
            over, width = f"{over}, padded to the checkpoint's block", padded
        w13 = f"N = 2 · {intermediate.how}{over} = {2 * width}; K = {hidden.how}"
        w2 = f"N = {hidden.how}; K = {_divided(intermediate, over, width)}"
        for name, n, k, arithmetic in (
            ("w13 (gate and up)", 2 * width, hidden, w13),
            ("w2 (down)", hidden, width, w2),
        ):
            for op, rows in serving.expert_ops(experts, routed + fused, n, k):
                text = f"{experts.module} {name}, {layers_text(experts.layers)}: {count}; {arithmetic}"
                self.ops.append((op, f"{text}; {rows}" if rows else text))

    def add_call(self, call: Call) -> None:
        """Add the op of another call, where DeepGEMM has the function on this GPU."""
        op = OPS[call.op].model_validate({"op": call.op, **call.fields})
        if (why := op.unsupported(self._serving.gpu.major)) is None:
            self.ops.append((op, call.what))
            return
        fields = ", ".join(f"{name} {value}" for name, value in call.fields.items())
        self.left_out.append(LeftOut(f"{call.op} ({fields}; {call.what})", why))


def _rows(part: Part, linear: Linear) -> int:
    """A part's rows on one rank."""
    if linear.split != "n" or linear.ranks == 1:
        return part.n
    if part.least and part.n < part.least * linear.ranks:
        heads = part.n // part.least
        if linear.ranks % heads:
            raise ModelError(f"{part.name}: wanted ranks a multiple of its {heads} heads, found {linear.ranks}")
        return part.least
    return _share(part.n, linear.ranks, f"{part.name}: N")


def _share(whole: Size, ranks: int, what: str) -> int:
    if whole % ranks:
        raise ModelError(f"{what} = {whole.how} = {whole}: wanted a multiple of the {ranks} ranks that share it")
    return whole // ranks


def _check_blocks(linear: Linear, k: int) -> None:
    """Both engines load block scales only where a division falls between blocks; `skips_block_check` has exceptions.

    ``validate_fp8_block_shape``: vLLM 0.33.0 ``layers/quantization/utils/fp8_utils.py`` (0.25.0 the same), SGLang
    0.5.23 ``srt/layers/quantization/fp8_utils.py`` and ``validate_block_quant_shapes`` in ``fp8.py``. In a fused layer
    that is not divided, the last weight may end within a block.
    """
    divided = linear.split == "n" and linear.ranks > 1
    for part in linear.parts if divided else linear.parts[:-1]:
        rows = _rows(part, linear)
        if rows % BLOCK:
            raise _refused_division(f"{part.name}: wanted N", part.n, linear.ranks if divided else 1, rows)
    if linear.split == "k" and linear.ranks > 1 and k % BLOCK:
        raise _refused_division(f"{linear.module}: wanted K", linear.k, linear.ranks, k)


def _refused_division(requirement: str, whole: Size, ranks: int, share: int) -> ModelError:
    division = f"{whole} / {ranks} = {share}" if ranks > 1 else f"{share}"
    return ModelError(
        f"{requirement} of each rank a multiple of {BLOCK}, the checkpoint's block, found {whole.how}: {division}",
        hint="the engine refuses to load this; divide it among fewer ranks",
    )


def _linear_arithmetic(linear: Linear, n: int, k: int) -> str:
    terms = [part.n.how for part in linear.parts]
    if len(terms) == 2 and terms[0] == terms[1]:  # gate and up
        how = f"2 · {terms[0]}"
    elif len(terms) == 3 and terms[1] == terms[2]:  # query, key and value
        how = f"{terms[0]} + 2 · {terms[1]}"
    else:
        how = " + ".join(terms)
    whole = Size(sum(part.n for part in linear.parts), how)
    over = f" / {linear.ranks} ranks" if linear.ranks > 1 else ""
    if linear.split == "n" and n != whole // linear.ranks:
        n_text = f"{how}, on each of {linear.ranks} ranks with K and V heads copied: {n}"
    else:
        n_text = _divided(whole, over if linear.split == "n" else "", n)
    return f"N = {n_text}; K = {_divided(linear.k, over if linear.split == 'k' else '', k)}"


def _divided(whole: Size, over: str, share: int) -> str:
    """``how = whole / ranks = share``."""
    return f"{whole.equation}{over} = {share}" if over else whole.equation


def _joined(ops: Sequence[tuple[OpBase, str]]) -> tuple[DerivedOp, ...]:
    """One op for each shape, with the largest maximum that any of its layers needs."""
    joined: dict[str, DerivedOp] = {}
    for op, text in ops:
        identity = op.model_dump_json(exclude={"max_tokens", "max_m"})
        if (known := joined.get(identity)) is None:
            joined[identity] = DerivedOp(op, (text,))
            continue
        limits: dict[str, int] = {}
        for name in ("max_tokens", "max_m"):
            values = [value for each in (known.op, op) if (value := getattr(each, name, None)) is not None]
            if values:
                limits[name] = max(values)
        joined[identity] = DerivedOp(known.op.model_copy(update=limits), (*known.serves, text))
    return tuple(joined.values())
