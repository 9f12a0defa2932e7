"""What the ops of the two-level indexer share (DeepSeek-V4.1, SM100): logits at the keys of chosen blocks only.

Each row of queries has its own list of blocks of 8 or 16 keys; column ``j · block + o`` of its logits is for key ``o``
of its ``j``-th block. All operands have packed UE8M0 scales for 1 × 32 (vLLM 0.33.0 ``vllm/utils/deep_gemm.py``). Which
kernels are taken depends on the formats, the blocks and the page, never on the number of rows or keys.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.attention import KEYS, Operand, expected_logits, logits_output, scaled_operand
from cachebuilder.ops.base import OpBase
from cachebuilder.ops.device import Device
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

    def operand(self, device: Device, inputs: Inputs | None, *shape: int) -> Operand:
        """Queries or keys ``[…, 128]``."""
        return scaled_operand(device, inputs, HEAD_DIM, True, self.format == "fp4", *shape)

    def data_type(self, torch: Any) -> Any:
        """Torch's type for the elements of Q and K."""
        return torch.int8 if self.format == "fp4" else torch.float8_e4m3fn

    @property
    def most_keys(self) -> int:
        """Of one row in a trial: an unaligned last block would end behind the keys, and a row with more blocks than
        there are would have one twice, which DeepGEMM may lose where it merges the blocks of two rows
        (``scheduler/sm100_sparse_mqa_logits_metadata.cuh`` of sgl-deep-gemm 0.2.3.post2).
        """
        return KEYS - self.block

    def chosen(self, device: Device, inputs: Inputs | None, rows: int) -> Any:
        """Blocks of each row, int32 [rows, ``blocks``]: ascending, the last repeated where there are too few."""
        if inputs is None:
            return device.empty(rows, self.blocks, dtype="int32")
        there = self.most_keys // self.block
        wanted = min(self.blocks, there)
        scores = inputs.normal(rows, there, dtype="float32")
        found = scores.topk(wanted, dim=-1).indices.sort(-1).values
        last = found[:, -1:].expand(-1, self.blocks - wanted)
        return device.torch.cat((found, last), 1).int()

    def position(self, device: Device, chosen: Any, starts: Any) -> Any:
        """The key of each column: blocks count from a row's first key, modulo the block."""
        offsets = device.torch.arange(self.block, device=device.name)
        first = chosen * self.block + (starts % self.block)[:, None]
        return (first[..., None] + offsets).flatten(1)

    def schedule_trial(self, device: Device, schedule: Any, wanted: Any, keys: Any) -> Trial:
        """Whether a schedule, which may have any order, leads to every block of every row once and to no other.

        Args:
            schedule: what DeepGEMM made.
            wanted: where each block is, [rows, ``blocks``].
            keys: of each row, [rows].
        """
        torch, wanted = device.torch, wanted.cpu().float()
        found = self.visited(device, schedule, len(wanted))
        there = torch.arange(self.blocks) < -(-keys.cpu() // self.block)[:, None]
        return Trial((Output("schedule", found, wanted, there, ~there, tolerance=0.0),))

    def visited(self, device: Device, schedule: Any, rows: int) -> Any:
        """Where each block of each row is, as the logits' kernel goes through ``schedule``: float32 [rows, ``blocks``].

        NaN where it does not come by, everywhere if this is no schedule; −1 where it comes twice. From
        ``layout/sparse_mqa_logits.cuh`` and ``impls/sm100_sparse_mqa_logits.cuh`` of sgl-deep-gemm 0.2.3.post2: a
        header, splits of 512 keys (640 in FP4), each a header and its blocks with their slots in up to two rows, and
        for each wave and SM a range of splits.
        """
        torch, per = device.torch, (640 if self.format == "fp4" else 512) // self.block
        nothing = torch.full((rows, self.blocks), math.nan)
        words = schedule.cpu().view(torch.int32).long() & 0xFFFFFFFF
        count, waves = words[:2].tolist()
        behind = 4 + count * (4 + 2 * per)
        end = behind + 4 * waves * int(device.deep_gemm.get_num_sms())
        if end > len(words):
            return nothing
        splits = words[4:behind].view(count, 4 + 2 * per)
        first, last, row, together = words[behind:end].view(-1, 4).unbind(1)
        lengths = last - first
        if (lengths < 0).any() or lengths.sum() != count or (last > count).any():
            return nothing
        if ((row + together)[lengths > 0] > rows).any():
            return nothing
        entry = torch.arange(len(lengths)).repeat_interleave(lengths)
        split = splits[first[entry] + torch.arange(len(entry)) - (lengths.cumsum(0) - lengths)[entry]]
        header, infos = split[:, :4], split[:, 4:].view(-1, per, 2)
        # Consecutive blocks are read as one, from where the first is.
        one = (header[:, 1] >> 31 == 1)[:, None]
        at = torch.where(one, infos[:, :1, 0] + self.block * torch.arange(per), infos[..., 0])
        found, visits = nothing.flatten(), torch.zeros(rows * self.blocks)
        for query in range(2):
            slot = (infos[..., 1] >> (16 * query)) & 0xFFFF
            mine = (slot != 0xFFFF) & (query < together[entry])[:, None]
            column = header[:, 2 + query, None] + slot
            if (column[mine] >= self.blocks).any():
                return nothing
            index = ((row[entry] + query)[:, None] * self.blocks + column)[mine]
            found[index] = at[mine].float()
            visits.index_add_(0, index, torch.ones(len(index)))
        found[visits > 1] = -1
        return found.view(rows, self.blocks)


class RowsOp(SparseOp):
    """Keys in one piece, of which each row sees those from its first to its last."""

    unaligned: Annotated[
        Literal[True] | None,
        Field(description="a row's first key need not begin a block, as in vLLM 0.33.0; left out: it does"),
    ] = None

    def alignment(self) -> dict[str, Any]:
        """The keyword argument that says so."""
        return {"use_unaligned_ks": bool(self.unaligned)}

    def schedule(self, device: Device, starts: Any, ends: Any, chosen: Any) -> Any:
        """DeepGEMM's own, for ``KEYS`` keys."""
        kind = self.data_type(device.torch)
        make = device.deep_gemm.get_sparse_mqa_logits_metadata
        return make(starts, ends, KEYS, chosen, kind, self.block, **self.alignment())

    def bounds(self, device: Device, inputs: Inputs | None, rows: int) -> tuple[Any, Any]:
        """First and last keys, int32 [rows] each."""
        if inputs is None:
            return device.empty(rows, dtype="int32"), device.empty(rows, dtype="int32")
        first = inputs.integers(0, self.block - 1, rows) if self.unaligned else [0] * rows
        last = inputs.integers(KEYS // 2, self.most_keys, rows)
        both = device.torch.tensor([first, last], dtype=device.torch.int32, device=device.name)
        return both[0], both[1]


class PagedOp(SparseOp):
    """Keys in cache pages; each row is a sequence of its own."""

    page_size: Annotated[Literal[16, 32, 64, 128], Field(description="tokens of one KV cache page")] = 64

    def schedule(self, device: Device, lengths: Any, table: Any, chosen: Any) -> Any:
        """DeepGEMM's own."""
        rows = device.torch.arange(len(lengths), dtype=device.torch.int32, device=device.name)
        kind = self.data_type(device.torch)
        make = device.deep_gemm.get_paged_sparse_mqa_logits_metadata
        return make(lengths, table, rows, self.page_size, chosen, kind, self.block)

    def cache(self, device: Device, inputs: Inputs | None, pages: int) -> tuple[Any, Operand]:
        """Pages as DeepGEMM reads them, and the keys in them."""
        keys = self.operand(device, inputs, pages * self.page_size)
        return keys.pages(device.torch, self.page_size, _PAGE_ALIGN), keys


class HeadsOp(SparseOp):
    """What the logits have on top of their schedule."""

    heads: Annotated[
        int, Field(ge=4, le=32, multiple_of=4, description="the indexer's query heads; sgl-deep-gemm has 32 only")
    ] = 32

    def sparse_trial(
        self, device: Device, logits: Any, q: Operand, keys: Any, weights: Any, position: Any, ends: Any
    ) -> Trial:
        """``logits`` beside the definition.

        Args:
            keys: of each row, float32 [rows, keys, 128], or of all, [keys, 128].
            position: of each column's key, [rows, ``blocks`` · ``block``].
            ends: behind each row's last key, [rows].
        """
        torch, rows = device.torch, len(weights)
        queries = q.values.view(rows, self.heads, HEAD_DIM)
        if keys.ndim == 2:
            whole = expected_logits(torch, queries, keys, weights)
        else:
            whole = torch.cat(
                [expected_logits(torch, queries[i : i + 1], keys[i], weights[i : i + 1]) for i in range(rows)]
            )
        expected = whole.gather(1, position.long())
        return Trial((logits_output(device, logits, expected, position < ends[:, None], bf16_weights=True),))
