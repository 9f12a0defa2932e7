"""What the indexer's ops share (DeepSeek sparse attention): logits of one KV head against many query heads.

``logits[s, t] = Σ_h weights[s, h] · max(0, q[s, h] · k[t])``, with quantised q and k. The formats and the number of
heads select the kernel; the numbers of queries and keys never do, which a test checks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from cachebuilder.ops import scaled
from cachebuilder.ops.base import OpBase
from cachebuilder.ops.device import Device, round_up
from cachebuilder.ops.trial import TOLERANCE, Inputs, Output, product_nt

#: Keys in a sweep's calls: any number selects the same kernels.
KEYS = 1024
#: The largest relative error of logits that SM100's kernels sum in BF16, as they do with BF16 weights
#: (``impls/sm100_mqa_logits.cuh`` and ``sm100_sparse_mqa_logits.cuh`` of sgl-deep-gemm 0.2.3.post2): 4 sums, rounded at
#: each of up to 16 steps. The same steps on a CPU are off by 4.0e-3 with 32 heads and by 4.6e-3 with 64, one row of
#: 512 keys by up to 6.0e-3.
BF16_SUM_TOLERANCE = 1e-2
#: The fewest keys of a row in a trial of those kernels: with fewer, the rounding may exceed what is left of the sums.
FEWEST_KEYS = 64
#: Four exponents to an int32, one for 32 elements; FP8 or FP4.
MX = scaled.Quantisation(1, 32, "ue8m0")
MXFP4 = scaled.Quantisation(1, 32, "ue8m0", fp4=True)


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` has a parameter ``name``: from the signature in Python, from the docstring in pybind."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:
        return f"{name}:" in (function.__doc__ or "")


class BatchOp(OpBase):
    """An op over sequences with keys in cache pages; called with every batch from 1 to ``max_batch``."""

    variable: ClassVar[str] = "batch"
    maximum: ClassVar[str | None] = "max_batch"

    max_batch: Annotated[int, Field(ge=1, le=1 << 16, description="the most sequences in one call (max_num_seqs)")]

    def points(self, device: Device) -> range:
        """Every batch from 1 to ``max_batch``."""
        return range(1, self.max_batch + 1)


@dataclass(frozen=True)
class Vectors:
    """Quantised queries or keys.

    Attributes:
        data: ``[…, D]``, in FP4 ``[…, D/2]`` bytes.
        scales: ``[…]``: float32, or four exponents in an int32; None for queries without scales.
        values: float32 ``[rows, D]``; None if uninitialised.
    """

    data: Any
    scales: Any
    values: Any

    @property
    def pair(self) -> tuple[Any, Any]:
        """As DeepGEMM takes them."""
        return self.data, self.scales

    def pages(self, torch: Any, page_size: int, align: int = 1) -> Any:
        """The same as a KV cache: uint8 ``[pages, page_size, 1, D + 4]``, in each page the data, then the scales."""
        data = self.data.view(torch.uint8).view(-1, page_size * self.data.shape[-1])
        scales = self.scales.view(-1, page_size).view(torch.uint8)
        width = self.data.shape[-1] + 4
        stride = round_up(page_size * width, align)
        joined = torch.nn.functional.pad(torch.cat((data, scales), 1), (0, stride - page_size * width))
        return joined.as_strided((len(data), page_size, 1, width), (stride, width, width, 1))


def unscaled_vectors(device: Device, inputs: Inputs | None, *shape: int) -> Vectors:
    """FP8 queries ``[…, D]`` of ``shape`` without scales; uninitialised without ``inputs``."""
    data = inputs.normal(*shape) if inputs else device.empty(*shape, dtype="bfloat16")
    data = data.to(device.torch.float8_e4m3fn)
    return Vectors(data, None, data.float().view(-1, shape[-1]))


def scaled_vectors(device: Device, inputs: Inputs | None, quantisation: scaled.Quantisation, *shape: int) -> Vectors:
    """Queries or keys ``[…, D]`` of ``shape`` with one scale for each row; uninitialised without ``inputs``."""
    *outer, dim = shape
    rows = math.prod(outer)
    if inputs is None:
        operand = scaled.empty(device, (rows, dim), quantisation)
    else:
        operand = scaled.random(device, inputs, (rows, dim), quantisation)
    scales = operand.scales[0, :rows] if quantisation.packed else operand.scales[:, 0]
    values = operand.values(device.torch) if inputs else None
    return Vectors(operand.data.view(*outer, operand.data.shape[-1]), scales.contiguous().view(outer), values)


def expected_logits(torch: Any, q: Any, k: Any, weights: Any) -> Any:
    """float32 logits [rows, keys] of values ``q`` [rows, heads, D], ``k`` [keys, D] and ``weights`` [rows, heads]."""
    total = torch.zeros(q.shape[0], k.shape[0], device=q.device)
    for head in range(q.shape[1]):
        total += torch.relu(product_nt(torch, q[:, head], k)) * weights[:, head, None].float()
    return total


def logits_output(device: Device, logits: Any, expected: Any, valid: Any, bf16_weights: bool) -> Output:
    """``logits`` must be as expected where ``valid``; DeepGEMM allocates them, so the others may hold anything."""
    tolerance = BF16_SUM_TOLERANCE if bf16_weights else TOLERANCE
    return Output("logits", logits, expected, valid, device.torch.zeros_like(valid), tolerance)
