"""What the ops of the two-level indexer share (DeepSeek-V4.1, SM100): logits at the keys of chosen blocks only.

Each row of queries has its own list of blocks of 8 or 16 keys; column ``j · block + o`` of its logits is for key ``o``
of its ``j``-th block. All operands have packed UE8M0 scales for 1 × 32 (vLLM 0.33.0 ``vllm/utils/deep_gemm.py``). Which
kernels are taken depends on the formats, the blocks and the page, never on the number of rows or keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.attention import KEYS, Operand, expected_logits, logits_output, scaled_operand
from cachebuilder.ops.base import Device, OpBase
from cachebuilder.ops.trial import Inputs, Trial

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

    def chosen(self, device: Device, inputs: Inputs | None, rows: int) -> Any:
        """Blocks of each row, int32 [rows, ``blocks``]: ascending, the last repeated where there are too few."""
        if inputs is None:
            return device.empty(rows, self.blocks, dtype="int32")
        there = KEYS // self.block - 1  # an unaligned last block would end behind the keys
        wanted = min(self.blocks, there)
        scores = inputs.normal(rows, there, dtype="float32")
        found = scores.topk(wanted, dim=-1).indices.sort(-1).values
        last = found[:, -1:].expand(-1, self.blocks - wanted)
        return device.torch.cat((found, last), 1).int()


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
        last = inputs.integers(KEYS // 2, KEYS, rows)
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
        return Trial((logits_output(device, logits, expected, position < ends[:, None]),))

    def position(self, device: Device, chosen: Any, starts: Any) -> Any:
        """The key of each column: blocks count from a row's first key, modulo the block."""
        offsets = device.torch.arange(self.block, device=device.name)
        first = chosen * self.block + (starts % self.block)[:, None]
        return (first[..., None] + offsets).flatten(1)
