"""``fp8_mega_moe``: a whole MoE layer in one kernel, FP8, on SM90."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe import LAYER_TOLERANCE, MegaMoeOp, layer, sm90_buffer
from cachebuilder.ops.scaled import FP8_MAX, random
from cachebuilder.ops.trial import Inputs, Trial, dense_output


class Fp8MegaMoe(MegaMoeOp):
    """Expert weights in FP8 with 128 × 128 scales, as SGLang 0.5.23 ``layers/moe/mega_moe_sm90.py`` calls it."""

    majors = (9,)

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2"

    op: Literal["fp8_mega_moe"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = sm90_buffer(device, self)
        experts, hidden, inner = self.local_experts, self.hidden, self.intermediate
        blocks = hidden // 128, inner // 128
        first = (
            device.empty(experts, 2 * inner, hidden, dtype="float8_e4m3fn"),
            device.empty(experts, 2 * blocks[1], blocks[0], dtype="float32"),
        )
        second = (
            device.empty(experts, hidden, inner, dtype="float8_e4m3fn"),
            device.empty(experts, *blocks, dtype="float32"),
        )
        y = device.empty(self.largest_m, hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, there, activation_clamp=self.activation_clamp)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank; activations between the GEMMs in FP8 with a float32 scale for each 1 × 64."""
        torch, inputs, hidden = device.torch, Inputs(device, seed), self.hidden
        there = sm90_buffer(device, self)
        x = random(device, inputs, (value, hidden), (1, 128), False)
        first = random(device, inputs, (self.local_experts, 2 * self.intermediate, hidden), (128, 128), False)
        second = random(device, inputs, (self.local_experts, hidden, self.intermediate), (128, 128), False)
        chosen, weights = self.routing(device, inputs, value)
        there.x.view(torch.float8_e4m3fn)[:value], there.x_sf[:value] = x.pair()
        there.topk_idx[:value], there.topk_weights[:value] = chosen, weights
        y, buffer = inputs.output(value, hidden, dtype="bfloat16")
        given = device.deep_gemm.transform_weights_for_mega_moe_sm90(first.pair(), second.pair())
        self.function(device.deep_gemm)(y, *given, there, activation_clamp=self.activation_clamp)

        def quantised(activation: Any) -> Any:
            """Rows in FP8 and back."""
            groups = activation.unflatten(-1, (-1, 64))
            scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_MAX
            return ((groups / scales).to(torch.float8_e4m3fn).float() * scales).flatten(-2)

        expected = layer(
            torch, self, x.values(torch), chosen, weights,
            lambda expert: first.values(torch, expert), lambda expert: second.values(torch, expert), quantised,
        )  # fmt: skip
        return Trial((replace(dense_output(torch, "y", buffer, expected), tolerance=LAYER_TOLERANCE),))
