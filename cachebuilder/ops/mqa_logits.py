"""The indexer's logits of all keys, in one piece (prefill) or in cache pages (decode), and the decode's schedule."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.attention import (
    FEWEST_KEYS,
    KEYS,
    MX,
    MXFP4,
    BatchOp,
    Vectors,
    accepts,
    expected_logits,
    logits_output,
    scaled_vectors,
    unscaled_vectors,
)
from cachebuilder.ops.base import OpBase, TokenOp
from cachebuilder.ops.device import Device, ceil_div
from cachebuilder.ops.scaled import Quantisation
from cachebuilder.ops.seen import SeenCall, Sighting, Tensor, require
from cachebuilder.ops.trial import Inputs, Output, Trial

#: The arguments of the paged logits, in order (sgl-deep-gemm 0.2.3.post2 ``deep_gemm/__init__.py``).
_PAGED = ("q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len", "clean_logits")


class MqaOp(OpBase):
    """Formats of an op over queries [rows, heads, head_dim] and keys [tokens, head_dim].

    Left out: FP8 with a float32 scale for each key, float32 weights and logits, as SGLang's DeepSeek-V3.2 has them, and
    vLLM's on SM90. vLLM 0.33.0 on SM100: ``scales: mx, weights: bfloat16, logits: bfloat16``
    (``vllm/utils/deep_gemm.py``, ``mqa_logits_mx_inputs``).
    """

    #: Whether the function takes Q with its scales, and so all formats; else FP8 only.
    all_formats: ClassVar[bool] = True

    heads: Annotated[Literal[8, 16, 32, 64], Field(description="the indexer's query heads")]
    head_dim: Literal[32, 64, 128] = 128
    format: Annotated[Literal["fp4"] | None, Field(description="of Q and K; left out: FP8")] = None
    scales: Annotated[Literal["mx"] | None, Field(description="mx: packed UE8M0 for 1 × 32, as FP4 always has")] = None
    weights: Annotated[Literal["bfloat16"] | None, Field(description="left out: float32")] = None
    logits: Annotated[Literal["bfloat16"] | None, Field(description="left out: float32")] = None
    clean_logits: Annotated[Literal[True] | None, Field(description="positions out of range become −∞")] = None

    @model_validator(mode="after")
    def _check_formats(self) -> MqaOp:
        if self.weights and not self.logits:
            raise ValueError("BF16 weights go with BF16 logits")
        if not self.all_formats and (self.format or self.scales or self.weights or self.logits):
            other = self.op.replace("fp8_", "fp8_fp4_", 1)
            raise ValueError(f"format, scales, weights and logits are {other}' to choose")
        return self

    @classmethod
    def query_fields(cls, given: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Q without its scales, and the fields for the formats of Q, the weights and the logits.

        Raises:
            Inexpressible: Q has another type.
        """
        q, scales = given["q"] if isinstance(given["q"], tuple) else (given["q"], None)
        fp4 = isinstance(q, Tensor) and q.dtype in ("uint8", "int8", "float4_e2m1fn_x2")
        require(fp4 or (isinstance(q, Tensor) and q.dtype == "float8_e4m3fn"), f"queries of {q}")
        fields: dict[str, Any] = {"heads": q.shape[-2], "head_dim": q.shape[-1] * (2 if fp4 else 1)}
        if fp4:
            fields["format"] = "fp4"
        elif scales is not None:
            fields["scales"] = "mx"
        if given["weights"].dtype == "bfloat16":
            fields |= {"weights": "bfloat16", "logits": "bfloat16"}
        elif (given["logits_dtype"] or {}).get("text") == "torch.bfloat16":
            fields["logits"] = "bfloat16"
        if given["clean_logits"]:
            fields["clean_logits"] = True
        return q, fields

    @property
    def mx(self) -> bool:
        """Whether Q has block scales."""
        return self.scales == "mx" or self.format == "fp4"

    def unsupported(self, major: int) -> str | None:
        """SM90 has no MX scales, no BF16 weights and no fewer than 32 heads."""
        if major == 9 and (self.mx or self.weights):
            return "MX scales, FP4 and BF16 weights are Blackwell's; SM90 has FP8 with float32 scales and weights"
        if major == 9 and self.heads < 32:
            return "SM90's kernels have 32 or 64 heads"
        return super().unsupported(major)

    def queries(self, device: Device, inputs: Inputs | None, *shape: int) -> Vectors:
        """Queries of ``shape`` ``[…, heads]``; uninitialised without ``inputs``."""
        if not self.mx:
            return unscaled_vectors(device, inputs, *shape, self.head_dim)
        return self.keys(device, inputs, *shape)

    def keys(self, device: Device, inputs: Inputs | None, *shape: int) -> Vectors:
        """Keys of ``shape``; uninitialised without ``inputs``."""
        quantisation = MXFP4 if self.format == "fp4" else MX if self.mx else Quantisation(1, 128)
        return scaled_vectors(device, inputs, quantisation, *shape, self.head_dim)

    def query_argument(self, q: Vectors, head: int | None = None) -> Any:
        """Q as this function takes it; its first ``head`` rows only."""
        scales = None if q.scales is None else q.scales[:head]
        return (q.data[:head], scales) if self.all_formats else q.data[:head]

    def format_options(self, device: Device, function: Callable[..., Any]) -> dict[str, Any]:
        """Keyword arguments for what this DeepGEMM lets the caller choose.

        vLLM 0.33.0's copy has no ``logits_dtype``: the arch decides.
        """
        options: dict[str, Any] = {}
        if accepts(function, "clean_logits"):
            options["clean_logits"] = bool(self.clean_logits)
        if self.logits and accepts(function, "logits_dtype"):
            options["logits_dtype"] = device.torch.bfloat16
        return options

    def check(self, device: Device, logits: Any) -> None:
        """Raises ValueError if DeepGEMM returned logits of another type than the manifest says."""
        dtype = getattr(device.torch, self.logits or "float32")
        if logits.dtype != dtype:
            raise ValueError(f"this DeepGEMM returns {logits.dtype} logits here: wanted {dtype}")


class MqaLogits(MqaOp, TokenOp):
    """Queries [rows, heads, head_dim], keys [tokens, head_dim] in one piece."""

    variable = "rows"

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """Heads and formats from Q and the weights, the rows from Q."""
        starts, ends = ("ks", "ke") if "ks" in call.options else ("cu_seq_len_k_start", "cu_seq_len_k_end")
        names = ("q", "kv", "weights", starts, ends, "clean_logits", "max_seqlen_k", "logits_dtype", "schedule_meta")
        given = call.by_name(*names)
        q, fields = cls.query_fields(given)
        require(len(q.shape) == 3, "queries of other than three dimensions")
        if given["max_seqlen_k"]:
            fields["compressed"] = True
        return Sighting(fields, q.shape[0])

    compressed: Annotated[Literal[True] | None, Field(description="the engine passes max_seqlen_k")] = None

    def call_options(self, device: Device, function: Callable[..., Any], keys: int) -> dict[str, Any]:
        """Keyword arguments; a DeepGEMM without ``clean_logits`` has the compressed form only."""
        compressed = self.compressed or not accepts(function, "clean_logits")
        return self.format_options(device, function) | {"max_seqlen_k": keys if compressed else 0}

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the most rows, row-sliced at each call."""
        rows = self.largest_m
        q, kv = self.queries(device, None, rows, self.heads), self.keys(device, None, KEYS)
        weights = device.empty(rows, self.heads, dtype=self.weights or "float32")
        starts, ends = device.empty(rows, dtype="int32"), device.empty(rows, dtype="int32")
        function = self.function(device.deep_gemm)
        options = self.call_options(device, function, KEYS)

        def call(m: int) -> None:
            query = self.query_argument(q, m)
            self.check(device, function(query, kv.pair, weights[:m], starts[:m], ends[:m], **options))

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` rows against 1024 keys, each from its own first to its own last."""
        torch, inputs = device.torch, Inputs(device, seed)
        q, kv = self.queries(device, inputs, value, self.heads), self.keys(device, inputs, KEYS)
        weights = inputs.normal(value, self.heads, dtype=self.weights or "float32")
        starts = device.integers(inputs.integers(0, KEYS // 2 - FEWEST_KEYS, value))
        ends = device.integers(inputs.integers(KEYS // 2 + 1, KEYS, value))
        function = self.function(device.deep_gemm)
        options = self.call_options(device, function, KEYS)
        logits = function(self.query_argument(q), kv.pair, weights, starts, ends, **options)
        self.check(device, logits)
        expected = expected_logits(torch, q.values.view(value, self.heads, -1), kv.values, weights)
        position = torch.arange(KEYS, device=device.name)[None]
        if options["max_seqlen_k"]:
            source = (position + starts[:, None]).clamp(max=KEYS - 1).long()
            expected, valid = expected.gather(1, source), position < (ends - starts)[:, None]
        else:
            valid = (position >= starts[:, None]) & (position < ends[:, None])
        return Trial((logits_output(device, logits[:, :KEYS], expected, valid, bool(self.weights)),))


class Fp8Fp4MqaLogits(MqaLogits):
    """The indexer's logits of a prefill, keys in one piece; called with every number of rows to ``max_tokens``.

    ``compressed`` is another kernel, with which each row's logits begin at its own first key (``max_seqlen_k``): vLLM
    0.33.0 and SGLang's DeepSeek-V4 use it, SGLang's DeepSeek-V3.2 does not.
    """

    op: Literal["fp8_fp4_mqa_logits"]


class Fp8MqaLogits(MqaLogits):
    """As `Fp8Fp4MqaLogits`, in FP8 with float32 scales and float32 logits, as SGLang calls it."""

    all_formats = False
    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2 and vLLM 0.25.0's copy"

    op: Literal["fp8_mqa_logits"]


class PagedOp(BatchOp):
    """Sequences of ``next_n`` query rows each, with keys in cache pages."""

    next_n: Annotated[int, Field(ge=1, le=16, description="query rows of one sequence: 1 and the speculated ones")] = 1
    page_size: Annotated[Literal[32, 64, 128], Field(description="tokens of one KV cache page")] = 64
    varlen: Annotated[Literal[True] | None, Field(description="indices say which rows are of one sequence")] = None

    def unsupported(self, major: int) -> str | None:
        """SM90 has no indices."""
        return "varlen is Blackwell's" if major == 9 and self.varlen else super().unsupported(major)

    def indices(self, device: Device, batch: int) -> dict[str, Any]:
        """The keyword argument of ``varlen``, for a call of ``batch`` sequences."""
        if not self.varlen:
            return {}
        return {"indices": device.torch.arange(batch, dtype=device.torch.int32, device=device.name)}

    def schedule_slots(self, device: Device) -> int:
        """Units that share the work: SMs, or pairs of SMs on SM90 with 4 query rows.

        vLLM 0.33.0 ``vllm/utils/deep_gemm.py``, ``_paged_mqa_logits_schedule_slots``.
        """
        sms = int(device.deep_gemm.get_num_sms())
        return sms // 2 if self.next_n == 4 and device.major == 9 else sms

    def schedule(self, device: Device, lengths: Any) -> Any:
        """DeepGEMM's own schedule, int32 [slots + 1, 2], for context lengths [batch, next_n]."""
        make, slots = device.deep_gemm.get_paged_mqa_logits_metadata, self.schedule_slots(device)
        return make(lengths, self.page_size, slots, **self.indices(device, len(lengths)))


class PagedMqaLogits(PagedOp, MqaOp):
    """Queries [batch, next_n, heads, head_dim] over a paged cache."""

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """Heads, next_n and the batch from Q, the page's size from the cache."""
        given = call.by_name(*_PAGED, "logits_dtype", "indices")
        q, fields = cls.query_fields(given)
        require(len(q.shape) == 4, "queries of other than four dimensions")
        fields |= {"next_n": q.shape[1], "page_size": given["kv_cache"].shape[1]}
        fields |= {"varlen": True} if given["indices"] is not None else {}
        return Sighting(fields, q.shape[0])

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest batch, sliced at each call."""
        batch, pages = self.max_batch, KEYS // self.page_size
        q = self.queries(device, None, batch, self.next_n, self.heads)
        cache = self.keys(device, None, KEYS).pages(device.torch, self.page_size)
        weights = device.empty(batch * self.next_n, self.heads, dtype=self.weights or "float32")
        lengths = device.empty(batch, self.next_n, dtype="int32")
        table = device.empty(batch, pages, dtype="int32")
        schedule = device.empty(self.schedule_slots(device) + 1, 2, dtype="int32")
        function = self.function(device.deep_gemm)
        options, indices = self.format_options(device, function), self.indices(device, batch)

        def call(size: int) -> None:
            query = self.query_argument(q, size)
            rows = weights[: size * self.next_n]
            sliced = options | {name: tensor[:size] for name, tensor in indices.items()}
            self.check(device, function(query, cache, rows, lengths[:size], table[:size], schedule, KEYS, **sliced))

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` sequences of up to 1024 keys in shuffled pages; the schedule is DeepGEMM's own."""
        torch, inputs = device.torch, Inputs(device, seed)
        pages, rows = KEYS // self.page_size, value * self.next_n
        q, keys = self.queries(device, inputs, value, self.next_n, self.heads), self.keys(device, inputs, 4 * KEYS)
        weights = inputs.normal(rows, self.heads, dtype=self.weights or "float32")
        table = device.integers(inputs.integers(0, 4 * pages - 1, value * pages)).view(value, pages)
        fewest = self.next_n + FEWEST_KEYS if self.weights else self.next_n
        last_rows = device.integers(inputs.integers(fewest, KEYS, value))[:, None]
        lengths = (last_rows - self.next_n + 1 + device.integers(range(self.next_n))).contiguous()
        function, cache = self.function(device.deep_gemm), keys.pages(torch, self.page_size)
        options = self.format_options(device, function) | self.indices(device, value)
        schedule = self.schedule(device, lengths)
        logits = function(self.query_argument(q), cache, weights, lengths, table, schedule, KEYS, **options)
        self.check(device, logits)
        key_pages = keys.values.view(4 * pages, self.page_size, -1)
        queries = q.values.view(value, self.next_n, self.heads, -1)
        weights = weights.view(value, self.next_n, self.heads)
        expected = [
            expected_logits(torch, queries[i], key_pages[table[i].long()].flatten(0, 1), weights[i])
            for i in range(value)
        ]
        valid = torch.arange(KEYS, device=device.name)[None] < lengths.view(rows, 1)
        return Trial((logits_output(device, logits, torch.cat(expected), valid, bool(self.weights)),))


class Fp8Fp4PagedMqaLogits(PagedMqaLogits):
    """The indexer's logits of a decode step, keys in cache pages; called with every batch to ``max_batch``."""

    op: Literal["fp8_fp4_paged_mqa_logits"]


class Fp8PagedMqaLogits(PagedMqaLogits):
    """As `Fp8Fp4PagedMqaLogits`, in FP8 with float32 scales and float32 logits, as SGLang calls it."""

    all_formats = False
    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2 and vLLM 0.25.0's copy"

    op: Literal["fp8_paged_mqa_logits"]


class GetPagedMqaLogitsMetadata(PagedOp):
    """Which SM takes which keys of which sequence in the paged logits; called with every batch to ``max_batch``.

    On SM90 and SM120 each 32 sequences more are another kernel.
    """

    op: Literal["get_paged_mqa_logits_metadata"]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """next_n and the batch from the context lengths."""
        given = call.by_name("context_lens", "block_kv", "num_sms", "indices")
        lengths = given["context_lens"]
        fields = {"next_n": lengths.shape[1] if len(lengths.shape) == 2 else 1, "page_size": given["block_kv"]}
        if given["indices"] is not None:
            fields["varlen"] = True
        return Sighting(fields, lengths.shape[0])

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Context lengths of the largest batch, sliced at each call."""
        lengths = device.empty(self.max_batch, self.next_n, dtype="int32")

        def call(batch: int) -> None:
            self.schedule(device, lengths[:batch])

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """The schedule of ``value`` sequences; SM90's and SM120's kernels define it exactly.

        SM100's is one of several right ones, depending on the copy: `in_order` checks what makes it right. From
        ``include/deep_gemm/scheduler/sm90_paged_mqa_logits.cuh`` and ``sm120_paged_mqa_logits.cuh`` of sgl-deep-gemm
        0.2.3.post2: keys in splits of 256 or 128, all sequences' splits in a row, shared out evenly, the SMs with one
        more last.
        """
        torch, inputs = device.torch, Inputs(device, seed)
        lengths = torch.tensor(inputs.integers(1, 8192, value), dtype=torch.int32)
        repeated = lengths[:, None].expand(-1, self.next_n).contiguous().to(device.name)
        actual = self.schedule(device, repeated).cpu()
        if device.major == 10:
            actual = in_order(torch, actual, lengths, self.next_n)
            expected = torch.ones_like(actual)
        else:
            atoms = ceil_div(self.next_n, 2)
            if device.major == 9 and self.next_n == 4 and int(actual[-1, 0]) == value:
                atoms = 1  # vLLM 0.33.0's copy: one unit for a pair of SMs
            split = 128 if device.major == 12 else 256
            rows = sm90_schedule(lengths.tolist(), self.schedule_slots(device), atoms, split)
            expected = torch.tensor(rows, dtype=torch.float32)
        everything = torch.ones_like(expected, dtype=torch.bool)
        return Trial((Output("schedule", actual, expected, everything, ~everything, tolerance=0.0),))


def sm90_schedule(lengths: list[int], slots: int, atoms: int, split: int = 256) -> list[tuple[int, int]]:
    """For each SM, and behind the last: its first sequence (in units of up to two query rows) and the split there."""
    splits = [ceil_div(length, split) for length in lengths for _ in range(atoms)]
    begins = list(itertools.accumulate(splits, initial=0))
    each, rest = divmod(begins[-1], slots)
    schedule = []
    for slot in range(slots + 1):
        start = slot * each + max(0, slot - (slots - rest))
        unit = min(bisect.bisect_right(begins, start) - 1, len(splits))
        schedule.append((unit, start - begins[unit]))
    return schedule


def in_order(torch: Any, schedule: Any, lengths: Any, next_n: int) -> Any:
    """float32 [SMs + 1, 1], 1 where an SM's first query row and split are right for SM100.

    They are right if the row is the first of a sequence that has this split, and the SM before begins no later. The
    first SM begins with the first row; the entry behind the last SM is behind the last row. A split is 256 keys in
    sgl-deep-gemm 0.1.7 and 0.2.3.post2, 384 in vLLM 0.33.0's copy (``scheduler/sm100_paged_mqa_logits.cuh``).
    """
    row, split = schedule.long().unbind(1)
    behind = len(lengths) * next_n
    splits = torch.cat((-(-lengths.long() // 256), torch.ones(1, dtype=torch.int64)))
    right = (row >= 0) & (row <= behind) & (row % next_n == 0) & (split >= 0)
    right &= split < splits[(row // next_n).clamp(0, len(lengths))]
    place = row * (1 << 20) + split
    right[1:] &= place.diff() >= 0
    right[0] &= place[0] == 0
    right[-1] &= row[-1] == behind
    return right[:, None].float()
