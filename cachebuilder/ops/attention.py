"""What the indexer's ops share (DeepSeek sparse attention): logits of one KV head against many query heads.

``logits[s, t] = Σ_h weights[s, h] · max(0, q[s, h] · k[t])``, over quantised q and k. Which kernel is taken depends on
the formats and on the number of heads only, never on the number of queries or keys: a test says so.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cachebuilder.ops import scaled
from cachebuilder.ops.base import OpBase
from cachebuilder.ops.device import Device, round_up
from cachebuilder.ops.trial import TOLERANCE, Inputs, Output

#: Keys in a sweep's calls: any number selects the same kernels.
KEYS = 1024
#: The largest relative error of logits that SM100's kernels sum in BF16, as they do with BF16 weights
#: (``impls/sm100_mqa_logits.cuh`` and ``sm100_sparse_mqa_logits.cuh`` of sgl-deep-gemm 0.2.3.post2): 4 sums, rounded at
#: each of up to 16 steps. The same steps on a CPU are off by 4.0e-3 with 32 heads and by 4.6e-3 with 64, one row of
#: 512 keys by up to 6.0e-3.
BF16_SUM_TOLERANCE = 1e-2
#: The fewest keys of a row in a trial of those: the errors of few logits may be larger than what is left of their sums.
FEWEST_KEYS = 64

Batch = Annotated[int, Field(ge=1, le=1 << 16, description="the most sequences in one call (max_num_seqs)")]
PageSize = Annotated[Literal[32, 64, 128], Field(description="tokens of one KV cache page")]
NextN = Annotated[int, Field(ge=1, le=16, description="query rows of one sequence: 1 and the speculated ones")]


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` has a parameter ``name``: Python's by signature, pybind's by docstring."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:
        return f"{name}:" in (function.__doc__ or "")


class MqaOp(OpBase):
    """Formats of an op over queries [rows, heads, head_dim] and keys [tokens, head_dim].

    Left out: FP8 with a float32 scale for each key, float32 weights and logits, which is SGLang's DeepSeek-V3.2 and
    vLLM's on SM90. vLLM 0.33.0 on SM100: ``scales: mx, weights: bfloat16, logits: bfloat16``
    (``vllm/utils/deep_gemm.py``, ``mqa_logits_mx_inputs``).
    """

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
        return self

    @property
    def mx(self) -> bool:
        """Whether Q has block scales."""
        return self.scales == "mx" or self.format == "fp4"

    def unsupported(self, major: int) -> str | None:
        """MX scales and BF16 weights are newer than SM90, few heads too."""
        if major == 9 and (self.mx or self.weights):
            return "MX scales, FP4 and BF16 weights are Blackwell's; SM90 has FP8 with float32 scales and weights"
        if major == 9 and self.heads < 32:
            return "SM90's kernels have 32 or 64 heads"
        return super().unsupported(major)

    def format_options(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Keyword arguments for what this DeepGEMM lets the caller choose."""
        given: dict[str, Any] = {}
        if accepts(function, "clean_logits"):
            given["clean_logits"] = bool(self.clean_logits)
        return given

    def logits_option(self, device: Device, function: Callable[..., Any]) -> dict[str, Any]:
        """``logits_dtype``, where the caller chooses it; vLLM 0.33.0's copy goes by the arch."""
        return {"logits_dtype": device.torch.bfloat16} if self.logits and accepts(function, "logits_dtype") else {}

    def check(self, device: Device, logits: Any) -> None:
        """Raises ValueError where DeepGEMM returned logits of another type than the manifest says."""
        wanted = getattr(device.torch, self.logits or "float32")
        if logits.dtype != wanted:
            raise ValueError(f"this DeepGEMM returns {logits.dtype} logits here: wanted {wanted}")

    def operand(self, device: Device, inputs: Inputs | None, query: bool, *shape: int) -> Operand:
        """Queries or keys ``[…, head_dim]``; uninitialised without ``inputs``."""
        if query and not self.mx:
            rows = math.prod(shape)
            data = inputs.normal(rows, self.head_dim) if inputs else device.empty(rows, self.head_dim, dtype="bfloat16")
            values = data.to(device.torch.float8_e4m3fn)
            return Operand(values.view(*shape, self.head_dim), None, values.float())
        return scaled_operand(device, inputs, self.head_dim, self.mx, self.format == "fp4", *shape)


def scaled_operand(device: Device, inputs: Inputs | None, head_dim: int, mx: bool, fp4: bool, *shape: int) -> Operand:
    """Queries or keys ``[…, head_dim]`` with a scale for each 1 × 32 (``mx``) or each row; uninitialised without
    ``inputs``.
    """
    rows = math.prod(shape)
    block = (1, 32) if mx else (1, 128)
    if inputs is None:
        made = scaled.empty(device, (rows, head_dim), block, mx, fp4)
    else:
        made = scaled.random(device, inputs, (rows, head_dim), block, mx, fp4)
    flat = made.scales[0, :rows] if mx else made.scales[:, 0]
    values = made.values(device.torch) if inputs else None
    return Operand(made.data.view(*shape, made.data.shape[-1]), flat.contiguous().view(shape), values)


class Operand:
    """Quantised queries or keys ``[…, D]``, their scales ``[…]``, and float32 values ``[rows, D]``."""

    def __init__(self, data: Any, scales: Any, values: Any) -> None:
        self.data, self.scales, self.values = data, scales, values

    @property
    def pair(self) -> tuple[Any, Any]:
        """As DeepGEMM takes it."""
        return self.data, self.scales

    def pages(self, torch: Any, page_size: int, align: int = 1) -> Any:
        """The same as a KV cache: uint8 ``[pages, page_size, 1, D + 4]``, in each page the data, then the scales."""
        data = self.data.view(torch.uint8).view(-1, page_size * self.data.shape[-1])
        scales = self.scales.view(-1, page_size).view(torch.uint8)
        width = self.data.shape[-1] + 4
        stride = round_up(page_size * width, align)
        joined = torch.nn.functional.pad(torch.cat((data, scales), 1), (0, stride - page_size * width))
        return joined.as_strided((len(data), page_size, 1, width), (stride, width, width, 1))


def expected_logits(torch: Any, q: Any, k: Any, weights: Any) -> Any:
    """float32 logits [rows, keys] of values ``q`` [rows, heads, D], ``k`` [keys, D] and ``weights`` [rows, heads]."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        total = torch.zeros(q.shape[0], k.shape[0], device=q.device)
        for head in range(q.shape[1]):
            total += torch.relu(q[:, head] @ k.mT) * weights[:, head, None].float()
        return total
    finally:
        torch.set_float32_matmul_precision(before)


def logits_output(device: Device, logits: Any, expected: Any, valid: Any, bf16_weights: bool) -> Output:
    """Logits are right where ``valid``; DeepGEMM allocates them, so nothing is said of the rest."""
    tolerance = BF16_SUM_TOLERANCE if bf16_weights else TOLERANCE
    return Output("logits", logits, expected, valid, device.torch.zeros_like(valid), tolerance)


def schedule_slots(device: Device, next_n: int) -> int:
    """Units that share the work: SMs; on SM90 with 4 query rows, pairs of SMs.

    vLLM 0.33.0 ``vllm/utils/deep_gemm.py``, ``_paged_mqa_logits_schedule_slots``.
    """
    sms = int(device.deep_gemm.get_num_sms())
    return sms // 2 if next_n == 4 and device.major == 9 else sms


def paged_schedule(device: Device, lengths: Any, page_size: int, varlen: bool | None) -> Any:
    """DeepGEMM's own schedule, int32 [slots + 1, 2], for context lengths [batch, next_n]."""
    given = {}
    if varlen:
        given["indices"] = device.torch.arange(len(lengths), dtype=device.torch.int32, device=device.name)
    slots = schedule_slots(device, lengths.shape[1])
    return device.deep_gemm.get_paged_mqa_logits_metadata(lengths, page_size, slots, **given)
