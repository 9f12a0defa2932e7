"""``nvfp4_mega_moe``: a whole MoE layer in one kernel, NVFP4 activations and weights, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe import nvfp4_buffer
from cachebuilder.ops.mega_moe_sm100 import Kind, NormedActivatedMegaMoeOp, Plain, around_one, shared_rows
from cachebuilder.ops.scaled import Scaled, packed
from cachebuilder.ops.trial import Inputs, Trial


class Nvfp4MegaMoe(NormedActivatedMegaMoeOp):
    """Expert weights in FP4 with an E4M3 scale for each 1 × 16, as vLLM 0.33.0 ``fused_moe/deep_gemm_mega_moe.py``.

    That gives ``use_x_scales`` always. SGLang 0.5.23 ``layers/moe/mega_moe.py`` gives ``l1_alphas``, ``l2_alphas`` and
    ``l2_act_scales`` beside it, by the name of ``fp8_fp4_mega_moe``: it is the same kernel.
    """

    found_in = "sgl-deep-gemm 0.1.7 to 0.2.5 and vLLM 0.33.0's copy"
    plain = (*NormedActivatedMegaMoeOp.plain, "use_x_scales")

    op: Literal["nvfp4_mega_moe"]
    activation: Annotated[
        Literal["swigluoai", "swiglustep"] | None,
        Field(description="left out: swiglu; swigluoai is sgl-deep-gemm's, swiglustep vLLM's copy's"),
    ] = None
    use_x_scales: Annotated[Literal[True] | None, Field(description="each token has a float32 scale, too")] = None
    l1_alphas: Annotated[Literal[True] | None, Field(description="each expert's gate and up have scales")] = None
    l2_alphas: Annotated[Literal[True] | None, Field(description="each expert's output has a scale")] = None
    l2_act_scales: Annotated[
        Literal[True] | None, Field(description="each expert's activations between the GEMMs have a scale")
    ] = None
    shared_dtype: Annotated[
        Literal["bfloat16"] | None, Field(description="of the shared experts in vLLM's copy; left out: FP8")
    ] = None

    @model_validator(mode="after")
    def _check_shared(self) -> Nvfp4MegaMoe:
        if self.shared_dtype and not self.shared_experts:
            raise ValueError("shared_dtype goes with shared_experts")
        return self

    def kinds(self) -> tuple[Kind, Kind]:
        """NVFP4 throughout."""
        return "nvfp4", "nvfp4"

    @property
    def buffer_type(self) -> str:
        """NVFP4."""
        return "nvfp4xnvfp4"

    def takes(self, deep_gemm: ModuleType, function: Callable[..., Any], field: str) -> bool:
        """The shared experts' type is the buffer's."""
        if field == "shared_dtype":
            return nvfp4_buffer(deep_gemm) is not None
        return super().takes(deep_gemm, function, field)

    def shared_kind(self, device: Device) -> Kind:
        """FP8 or BF16 in vLLM 0.33.0's copy (``deep_gemm/mega/nvfp4.py``), NVFP4 in sgl-deep-gemm."""
        if nvfp4_buffer(device.deep_gemm) is None:
            return "nvfp4"
        return "bf16" if self.shared_dtype else "fp8"

    def buffer_options(self, device: Device) -> dict[str, Any]:
        """The shared experts' type, too."""
        given = {"shared_dtype": device.torch.bfloat16} if self.shared_dtype else {}
        return super().buffer_options(device) | given

    def weights(self, device: Device, inputs: Inputs | None) -> tuple[Scaled | Plain, Scaled | Plain]:
        """TensorRT-LLM's scales are in rows (SGLang 0.5.23 ``muse_spark/muse_spark_megamoe.py``)."""
        made = super().weights(device, inputs)
        if self.weight_layout is None:
            return made
        first, second = (
            Plain((data, device.empty(*scales.shape, dtype="int32"))) for data, scales in (one.pair() for one in made)
        )
        return first, second

    def tensors(self, device: Device, inputs: Inputs | None) -> dict[str, Any]:
        """The scales of this rank's experts, too; gate and up have one each."""
        given, local = super().tensors(device, inputs), self.local_experts
        shapes = {"l1_alphas": (local, 2), "l2_alphas": (local,), "l2_act_scales": (local,)}
        return given | {k: around_one(device, inputs, *shape) for k, shape in shapes.items() if getattr(self, k)}

    def scaled_by(self, device: Device, inputs: Inputs, there: Any, tokens: int) -> Any:
        """Each token's scale, where it has one."""
        if not self.use_x_scales:
            return 1.0
        scales = around_one(device, inputs, tokens)
        there.x_scales[:tokens] = scales
        return scales[:, None]

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any] | None:
        """A routing weight is applied to the activation by sgl-deep-gemm (``impls/sm100_fp8_fp4_mega_moe.cuh``), to the
        output by vLLM 0.33.0's copy (``impls/sm100_nvfp4_mega_moe.cuh``).
        """
        if self.post_expert_norm or nvfp4_buffer(device.deep_gemm) is None:
            return super().combined(device, options)
        return lambda output, share: output * share

    def shared_inputs(self, device: Device, there: Any, x: Scaled | Plain, tokens: int, options: dict[str, Any]) -> Any:
        """Values of ``x`` in the shared experts' own type; a token's scale is not applied to them."""
        torch, values = device.torch, x.values(device.torch)
        if self.shared_dtype:
            there.shared_l1_acts[:tokens] = values.bfloat16()
            return values.bfloat16().float()
        own = packed(device, values, 32)
        there.shared_l1_acts.view(own.data.dtype)[:tokens] = own.data
        there.shared_l1_acts_sf[shared_rows(device, self, there, tokens)] = own.pair()[1]
        return own.values(torch)

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank.

        Raises:
            NotImplementedError: shared experts in NVFP4, sgl-deep-gemm's: no engine lays their scales out.
        """
        if self.shared_experts and self.shared_kind(device) == "nvfp4":
            raise NotImplementedError("no reference for shared experts in NVFP4")
        return super().trial(device, value, seed)
