"""The two-level indexer (DeepSeek-V4.1, SM100): logits of the keys in chosen blocks, and their schedules.

Each row of queries has its own list of blocks of 8 or 16 keys; column ``j · block + o`` of its logits is for key ``o``
of its ``j``-th block. All operands have packed UE8M0 scales for 1 × 32 (vLLM 0.33.0 ``vllm/utils/deep_gemm.py``). The
formats, the blocks and the page select the kernels; the numbers of rows and keys never do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.attention import (
    FEWEST_KEYS,
    KEYS,
    MX,
    MXFP4,
    BatchOp,
    Vectors,
    expected_logits,
    logits_output,
    scaled_vectors,
)
from cachebuilder.ops.base import OpBase, TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.seen import SeenCall, Sighting, Tensor, require
from cachebuilder.ops.trial import Inputs, Output, Trial

HEAD_DIM = 128
#: The stride of a cache page, bytes: vLLM 0.33.0's copy asserts a multiple of 256, sgl-deep-gemm 0.2.3.post2 one of 512
#: (``csrc/apis/attention.hpp``).
_PAGE_ALIGN = 512


class SparseOp(OpBase):
    """Fields of the four functions."""

    majors = (10,)
    found_in = "sgl-deep-gemm 0.2.3.post2 and vLLM 0.33.0's copy"

    block: Annotated[Literal[8, 16], Field(description="keys of one block")]
    blocks: Annotated[int, Field(ge=4, le=4096, multiple_of=4, description="blocks of a row")]
    format: Annotated[Literal["fp4"] | None, Field(description="of Q and K; left out: FP8")] = None

    def vectors(self, device: Device, inputs: Inputs | None, *shape: int) -> Vectors:
        """Queries or keys ``[…, 128]``."""
        return scaled_vectors(device, inputs, MXFP4 if self.format == "fp4" else MX, *shape, HEAD_DIM)

    @staticmethod
    def sparse_sighting(data_type: str, value: int, **fields: Any) -> Sighting:
        """``fields`` that are set, and the one for the elements of Q and K. Raises `Inexpressible`."""
        require(data_type in ("float8_e4m3fn", "int8", "uint8"), f"elements of {data_type}")
        formats = {} if data_type == "float8_e4m3fn" else {"format": "fp4"}
        return Sighting({name: field for name, field in fields.items() if field} | formats, value)

    @classmethod
    def schedule_sighting(cls, given: Mapping[str, Any], rows: Tensor, **fields: Any) -> Sighting:
        """Blocks and their formats from a call for a schedule, and ``fields``."""
        blocks = {"block": given["sparse_block_kv"], "blocks": given["sparse_kv_block_indices"].shape[1]}
        return cls.sparse_sighting(given["qk_dtype"]["text"].removeprefix("torch."), rows.shape[0], **blocks, **fields)

    @classmethod
    def logits_sighting(cls, given: Mapping[str, Any], **fields: Any) -> Sighting:
        """Blocks, heads and formats from a call for logits, and ``fields``."""
        q = given["q"][0] if isinstance(given["q"], tuple) else given["q"]
        blocks = {"block": given["sparse_block_kv"], "blocks": given["num_max_sparse_blocks"], "heads": q.shape[-2]}
        return cls.sparse_sighting(q.dtype, q.shape[0], **blocks, **fields)

    def data_type(self, torch: Any) -> Any:
        """Torch's type for the elements of Q and K."""
        return torch.int8 if self.format == "fp4" else torch.float8_e4m3fn

    @property
    def most_keys(self) -> int:
        """The most keys of one row in a trial.

        An unaligned last block would end behind the keys. A row with more blocks than there are would list one twice,
        which DeepGEMM may lose where it merges the blocks of two rows
        (``scheduler/sm100_sparse_mqa_logits_metadata.cuh`` of sgl-deep-gemm 0.2.3.post2).
        """
        return KEYS - self.block

    def block_ids(self, device: Device, inputs: Inputs | None, rows: int) -> Any:
        """Blocks of each row, int32 [rows, ``blocks``]: ascending, the last repeated if there are too few."""
        if inputs is None:
            return device.empty(rows, self.blocks, dtype="int32")
        available = self.most_keys // self.block
        count = min(self.blocks, available)
        scores = inputs.normal(rows, available, dtype="float32")
        ids = scores.topk(count, dim=-1).indices.sort(-1).values
        repeated = ids[:, -1:].expand(-1, self.blocks - count)
        return device.torch.cat((ids, repeated), 1).int()

    def positions(self, device: Device, block_ids: Any, starts: Any) -> Any:
        """The key of each column: blocks count from a row's first key, modulo the block."""
        offsets = device.torch.arange(self.block, device=device.name)
        first = block_ids * self.block + (starts % self.block)[:, None]
        return (first[..., None] + offsets).flatten(1)

    def schedule_trial(self, device: Device, schedule: Any, places: Any, keys: Any) -> Trial:
        """Whether ``schedule``, in any order, leads to every block of every row once and to no other.

        Args:
            places: where each block is, [rows, ``blocks``].
            keys: of each row, [rows].
        """
        torch, places = device.torch, places.cpu().float()
        visited = self.visited(device, schedule, len(places))
        exists = torch.arange(self.blocks) < -(-keys.cpu() // self.block)[:, None]
        return Trial((Output("schedule", visited, places, exists, ~exists, tolerance=0.0),))

    def visited(self, device: Device, schedule: Any, rows: int) -> Any:
        """Where each block of each row is, as the logits' kernel goes through ``schedule``: float32 [rows, ``blocks``].

        NaN for a block that it never reaches, for all blocks if this is no schedule; −1 for one that it reaches twice.
        From ``layout/sparse_mqa_logits.cuh`` and ``impls/sm100_sparse_mqa_logits.cuh`` of sgl-deep-gemm 0.2.3.post2: a
        header, then splits of 512 keys (640 in FP4), each a header and its blocks with their slots in up to two rows,
        then for each wave and SM a range of splits.
        """
        torch, per_split = device.torch, (640 if self.format == "fp4" else 512) // self.block
        nothing = torch.full((rows, self.blocks), math.nan)
        words = schedule.cpu().view(torch.int32).long() & 0xFFFFFFFF
        count, waves = words[:2].tolist()
        splits_end = 4 + count * (4 + 2 * per_split)
        end = splits_end + 4 * waves * int(device.deep_gemm.get_num_sms())
        if end > len(words):
            return nothing
        splits = words[4:splits_end].view(count, 4 + 2 * per_split)
        first, last, row, together = words[splits_end:end].view(-1, 4).unbind(1)
        lengths = last - first
        if (lengths < 0).any() or lengths.sum() != count or (last > count).any():
            return nothing
        if ((row + together)[lengths > 0] > rows).any():
            return nothing
        entry = torch.arange(len(lengths)).repeat_interleave(lengths)
        split = splits[first[entry] + torch.arange(len(entry)) - (lengths.cumsum(0) - lengths)[entry]]
        header, infos = split[:, :4], split[:, 4:].view(-1, per_split, 2)
        # Consecutive blocks are read as one, from where the first is.
        consecutive = (header[:, 1] >> 31 == 1)[:, None]
        place = torch.where(consecutive, infos[:, :1, 0] + self.block * torch.arange(per_split), infos[..., 0])
        places, visits = nothing.flatten(), torch.zeros(rows * self.blocks)
        for query in range(2):
            slot = (infos[..., 1] >> (16 * query)) & 0xFFFF
            used = (slot != 0xFFFF) & (query < together[entry])[:, None]
            column = header[:, 2 + query, None] + slot
            if (column[used] >= self.blocks).any():
                return nothing
            index = ((row[entry] + query)[:, None] * self.blocks + column)[used]
            places[index] = place[used].float()
            visits.index_add_(0, index, torch.ones(len(index)))
        places[visits > 1] = -1
        return places.view(rows, self.blocks)


class RowsOp(SparseOp):
    """Keys in one piece, of which each row sees those from its first to its last."""

    variable = "rows"

    unaligned: Annotated[
        Literal[True] | None,
        Field(description="a row's first key need not begin a block, as in vLLM 0.33.0; left out: it does"),
    ] = None

    def alignment(self) -> dict[str, Any]:
        """The keyword argument for ``unaligned``."""
        return {"use_unaligned_ks": bool(self.unaligned)}

    def schedule(self, device: Device, starts: Any, ends: Any, block_ids: Any) -> Any:
        """DeepGEMM's own, for ``KEYS`` keys."""
        kind = self.data_type(device.torch)
        make = device.deep_gemm.get_sparse_mqa_logits_metadata
        return make(starts, ends, KEYS, block_ids, kind, self.block, **self.alignment())

    def keys_of_rows(self, device: Device, inputs: Inputs | None, rows: int) -> tuple[Any, Any, Any]:
        """Each row's first key and the end of its keys, int32 [rows], and its `block_ids`."""
        if inputs is None:
            starts, ends = device.empty(rows, dtype="int32"), device.empty(rows, dtype="int32")
        else:
            starts = device.integers(inputs.integers(0, self.block - 1, rows) if self.unaligned else [0] * rows)
            ends = device.integers(inputs.integers(KEYS // 2, self.most_keys, rows))
        return starts, ends, self.block_ids(device, inputs, rows)


class PagedSparseOp(SparseOp):
    """Keys in cache pages; each row is a sequence of its own."""

    page_size: Annotated[Literal[16, 32, 64, 128], Field(description="tokens of one KV cache page")] = 64

    @property
    def pages(self) -> int:
        """Cache pages of one sequence."""
        return KEYS // self.page_size

    def schedule(self, device: Device, lengths: Any, table: Any, block_ids: Any) -> Any:
        """DeepGEMM's own."""
        rows = device.torch.arange(len(lengths), dtype=device.torch.int32, device=device.name)
        kind = self.data_type(device.torch)
        make = device.deep_gemm.get_paged_sparse_mqa_logits_metadata
        return make(lengths, table, rows, self.page_size, block_ids, kind, self.block)

    def cache(self, device: Device, inputs: Inputs | None, pages: int) -> tuple[Any, Vectors]:
        """Pages as DeepGEMM reads them, and the keys in them."""
        keys = self.vectors(device, inputs, pages * self.page_size)
        return keys.pages(device.torch, self.page_size, _PAGE_ALIGN), keys

    def table(self, device: Device, inputs: Inputs, rows: int) -> Any:
        """Random pages of each sequence, out of four sequences' pages: int32 [rows, ``pages``]."""
        return device.integers(inputs.integers(0, 4 * self.pages - 1, rows * self.pages)).view(rows, self.pages)


class HeadsOp(SparseOp):
    """The logits' own field, beside those of their schedule."""

    heads: Annotated[
        int, Field(ge=4, le=32, multiple_of=4, description="the indexer's query heads; sgl-deep-gemm has 32 only")
    ] = 32


def _logits_trial(device: Device, logits: Any, every_key: Any, positions: Any, ends: Any) -> Trial:
    """``logits`` beside the definition.

    Args:
        every_key: expected logits of all keys, [rows, keys].
        positions: of each column's key, [rows, ``blocks`` · ``block``].
        ends: behind each row's last key, [rows].
    """
    expected = every_key.gather(1, positions.long())
    return Trial((logits_output(device, logits, expected, positions < ends[:, None], bf16_weights=True),))


class GetSparseMqaLogitsMetadata(RowsOp, TokenOp):
    """The schedule of `fp8_fp4_sparse_mqa_logits`; called with every number of rows to ``max_tokens``.

    The number of blocks is a template argument of its kernel.
    """

    op: Literal["get_sparse_mqa_logits_metadata"]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """The blocks of a row from their numbers, the rows from the first keys."""
        names = ("cu_seq_len_k_start", "cu_seq_len_k_end", "num_kv_tokens", "sparse_kv_block_indices", "qk_dtype")
        given = call.by_name(*names, "sparse_block_kv", "use_unaligned_ks")
        return cls.schedule_sighting(given, given["cu_seq_len_k_start"], unaligned=given["use_unaligned_ks"])

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Bounds and blocks of the most rows, sliced at each call."""
        starts, ends, block_ids = self.keys_of_rows(device, None, self.largest_m)

        def call(m: int) -> None:
            self.schedule(device, starts[:m], ends[:m], block_ids[:m])

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` rows with random blocks."""
        inputs = Inputs(device, seed)
        starts, ends, block_ids = self.keys_of_rows(device, inputs, value)
        schedule = self.schedule(device, starts, ends, block_ids)
        first_keys = self.positions(device, block_ids, starts)[:, :: self.block]
        return self.schedule_trial(device, schedule, first_keys, ends - starts)


class Fp8Fp4SparseMqaLogits(HeadsOp, RowsOp, TokenOp):
    """The indexer's logits at chosen blocks, of a prefill: queries [rows, heads, 128], keys [tokens, 128].

    Called with every number of rows to ``max_tokens``.
    """

    op: Literal["fp8_fp4_sparse_mqa_logits"]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """Heads, formats and rows from Q."""
        names = ("q", "kv", "weights", "metadata", "num_max_sparse_blocks", "sparse_block_kv", "use_unaligned_ks")
        given = call.by_name(*names)
        return cls.logits_sighting(given, unaligned=given["use_unaligned_ks"])

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the most rows, sliced at each call, and a schedule for each call."""
        rows = self.largest_m
        q, kv = self.vectors(device, None, rows, self.heads), self.vectors(device, None, KEYS)
        weights = device.empty(rows, self.heads, dtype="bfloat16")
        starts, ends, block_ids = self.keys_of_rows(device, None, rows)
        function, options = self.function(device.deep_gemm), self.alignment()

        def call(m: int) -> None:
            schedule = self.schedule(device, starts[:m], ends[:m], block_ids[:m])
            query = q.data[:m], q.scales[:m]
            function(query, kv.pair, weights[:m], schedule, self.blocks, self.block, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` rows against 1024 keys at random blocks."""
        inputs = Inputs(device, seed)
        q, kv = self.vectors(device, inputs, value, self.heads), self.vectors(device, inputs, KEYS)
        weights = inputs.normal(value, self.heads)
        starts, ends, block_ids = self.keys_of_rows(device, inputs, value)
        schedule = self.schedule(device, starts, ends, block_ids)
        function = self.function(device.deep_gemm)
        logits = function(q.pair, kv.pair, weights, schedule, self.blocks, self.block, **self.alignment())
        queries = q.values.view(value, self.heads, HEAD_DIM)
        every_key = expected_logits(device.torch, queries, kv.values, weights)
        return _logits_trial(device, logits, every_key, self.positions(device, block_ids, starts), ends)


class GetPagedSparseMqaLogitsMetadata(BatchOp, PagedSparseOp):
    """The schedule of `fp8_fp4_paged_sparse_mqa_logits`; called with every batch to ``max_batch``.

    The number of blocks is a template argument of its kernel.
    """

    op: Literal["get_paged_sparse_mqa_logits_metadata"]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """The blocks of a sequence from their numbers, the batch from the lengths."""
        names = ("context_lens", "block_table", "indices", "page_kv", "sparse_kv_block_indices", "qk_dtype")
        given = call.by_name(*names, "sparse_block_kv")
        return cls.schedule_sighting(given, given["context_lens"], page_size=given["page_kv"])

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Lengths, pages and blocks of the largest batch, sliced at each call."""
        lengths = device.empty(self.max_batch, dtype="int32")
        table = device.empty(self.max_batch, self.pages, dtype="int32")
        block_ids = self.block_ids(device, None, self.max_batch)

        def call(batch: int) -> None:
            self.schedule(device, lengths[:batch], table[:batch], block_ids[:batch])

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` sequences with random pages and blocks; a block's place counts blocks, page after page."""
        inputs = Inputs(device, seed)
        table = self.table(device, inputs, value)
        lengths = device.integers(inputs.integers(1, self.most_keys, value))
        block_ids = self.block_ids(device, inputs, value)
        schedule = self.schedule(device, lengths, table, block_ids)
        per_page = self.page_size // self.block
        places = table.gather(1, block_ids.long() // per_page) * per_page + block_ids % per_page
        return self.schedule_trial(device, schedule, places, lengths)


class Fp8Fp4PagedSparseMqaLogits(BatchOp, HeadsOp, PagedSparseOp):
    """The indexer's logits at chosen blocks, of a decode step: queries [batch, 1, heads, 128] over a paged cache.

    Called with every batch to ``max_batch``.
    """

    op: Literal["fp8_fp4_paged_sparse_mqa_logits"]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """Heads, formats and the batch from Q, the page from the cache."""
        given = call.by_name("q", "kv_cache", "weights", "metadata", "num_max_sparse_blocks", "sparse_block_kv")
        return cls.logits_sighting(given, page_size=given["kv_cache"].shape[1])

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest batch, sliced at each call, and a schedule for each call."""
        batch = self.max_batch
        q = self.vectors(device, None, batch, 1, self.heads)
        cache, _ = self.cache(device, None, self.pages)
        weights = device.empty(batch, self.heads, dtype="bfloat16")
        lengths, table = device.empty(batch, dtype="int32"), device.empty(batch, self.pages, dtype="int32")
        block_ids = self.block_ids(device, None, batch)
        function = self.function(device.deep_gemm)

        def call(size: int) -> None:
            schedule = self.schedule(device, lengths[:size], table[:size], block_ids[:size])
            query = q.data[:size], q.scales[:size]
            function(query, cache, weights[:size], schedule, self.blocks, self.block)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` sequences of 64 keys and more in shuffled pages, at random blocks."""
        torch, inputs = device.torch, Inputs(device, seed)
        q = self.vectors(device, inputs, value, 1, self.heads)
        cache, keys = self.cache(device, inputs, 4 * self.pages)
        weights = inputs.normal(value, self.heads)
        table = self.table(device, inputs, value)
        lengths = device.integers(inputs.integers(FEWEST_KEYS, self.most_keys, value))
        block_ids = self.block_ids(device, inputs, value)
        schedule = self.schedule(device, lengths, table, block_ids)
        logits = self.function(device.deep_gemm)(q.pair, cache, weights, schedule, self.blocks, self.block)
        queries = q.values.view(value, 1, self.heads, HEAD_DIM)
        own_keys = keys.values.view(4 * self.pages, self.page_size, HEAD_DIM)[table.long()].flatten(1, 2)
        every_key = torch.cat(
            [expected_logits(torch, queries[i], own_keys[i], weights[i : i + 1]) for i in range(value)]
        )
        positions = self.positions(device, block_ids, torch.zeros_like(lengths))
        return _logits_trial(device, logits, every_key, positions, lengths)
