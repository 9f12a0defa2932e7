"""The router of experts: its GEMM, scores and top k in one kernel (DeepSeek-V4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.base import Bf16K, Experts, TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.seen import SeenCall, Sighting, require, tensor
from cachebuilder.ops.trial import GUARD_ROWS, Inputs, Output, Trial, dense_output, product_nt

#: Scores that differ by less may change places: the reference sums the router's product in another order.
_NEAR = 1e-4


class Bf16MegaGate(TokenOp):
    """The router of experts: x [M, hidden], weight [experts, hidden]; called with every M from 1 to ``max_tokens``."""

    majors = (10,)
    found_in = "sgl-deep-gemm 0.2.3.post2 and vLLM 0.33.0's copy"

    op: Literal["bf16_mega_gate"]
    hidden: Bf16K
    experts: Experts
    topk: Annotated[int, Field(ge=1, le=64, description="experts a token is routed to")]
    scoring: Literal["identity", "sigmoid", "softmax", "sqrtsoftplus"] = "sqrtsoftplus"
    bias: Annotated[bool, Field(description="scores are corrected by a bias before the choice")] = True
    hashed: Annotated[
        Literal[True] | None,
        Field(description="the token's hash chooses the experts (fix_routing_mask, unmapped_topk_idx)"),
    ] = None

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """M and the hidden size from x, the experts from the weight."""
        names = ("x", "weight", "num_topk", "use_shared_as_routed", "num_shared_experts", "routed_scaling_factor")
        given = call.by_name(
            *names, "ep_rank", "scoring_func", "mask", "bias", "image_bias", "image_token_mask", "fix_routing_mask",
            "to_physical_map", "logical_count", "unmapped_topk_idx", "force_random", "out",
        )  # fmt: skip
        others = ("mask", "image_bias", "image_token_mask", "to_physical_map", "logical_count", "force_random")
        set_others = [name for name in ("use_shared_as_routed", "num_shared_experts", *others) if given[name]]
        require(not set_others, f"the arguments {', '.join(set_others)}")
        m, hidden = tensor(given["x"], 2, "bfloat16").shape
        fields = {"hidden": hidden, "experts": given["weight"].shape[0], "topk": given["num_topk"]}
        fields |= {"scoring": given["scoring_func"] or "identity", "bias": given["bias"] is not None}
        return Sighting(fields | ({"hashed": True} if given["fix_routing_mask"] is not None else {}), m)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call; arguments as vLLM 0.33.0 gives them."""
        largest = self.largest_m
        x = device.empty(largest, self.hidden, dtype="bfloat16")
        weight = device.empty(self.experts, self.hidden, dtype="bfloat16")
        bias = device.empty(self.experts, dtype="float32") if self.bias else None
        expert_ids = device.empty(largest, self.topk, dtype="int64")
        weights = device.empty(largest, self.topk, dtype="float32")
        hashed_ids = device.empty(largest, self.topk, dtype="int64") if self.hashed else None
        mask = device.empty(largest, dtype="bool") if self.hashed else None
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            out = (expert_ids[:m], weights[:m])
            options: dict[str, Any] = {"scoring_func": self.scoring, "bias": bias, "out": out}
            if hashed_ids is not None and mask is not None:
                options |= {"fix_routing_mask": mask[:m], "unmapped_topk_idx": hashed_ids[:m]}
            function(x[:m], weight, self.topk, False, 0, 1.0, 0, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``: the experts with the best scores, of equal scores the smaller expert first, and their shares.

        From ``impls/sm100_bf16_mega_gate.cuh`` and ``epilogue/sm100_mega_gate.cuh`` of sgl-deep-gemm 0.2.3.post2: score
        plus bias chooses the experts, and an expert's weight is its score, without the bias, over the sum of all chosen
        scores. Experts chosen by the token's hash stay. A row is not compared if two of the scores to choose from are
        near each other.

        Raises:
            NotImplementedError: softmax, which no copy's kernel has.
        """
        if self.scoring == "softmax":
            raise NotImplementedError("no reference for softmax")
        torch, inputs = device.torch, Inputs(device, seed)
        x = inputs.normal(value, self.hidden)
        weight = (inputs.normal(self.experts, self.hidden, dtype="float32") * self.hidden**-0.5).bfloat16()
        bias = inputs.normal(self.experts, dtype="float32") / 4 if self.bias else None
        weights, buffer = inputs.output(value, self.topk, dtype="float32")
        expert_ids = device.empty(value + GUARD_ROWS, self.topk, dtype="int64").fill_(-1)
        options: dict[str, Any] = {"scoring_func": self.scoring, "bias": bias, "out": (expert_ids[:value], weights)}
        hashed_ids = None
        if self.hashed:
            hashed_ids = inputs.normal(value, self.experts, dtype="float32").topk(self.topk).indices
            mask = device.empty(value, dtype="bool").fill_(True)
            options |= {"fix_routing_mask": mask, "unmapped_topk_idx": hashed_ids.clone()}
        self.function(device.deep_gemm)(x, weight, self.topk, False, 0, 1.0, 0, **options)
        scores = self.scores(torch, product_nt(torch, x, weight))
        best, expected_ids = (scores if bias is None else scores + bias).topk(min(self.topk + 1, self.experts), -1)
        certain = (best.diff(dim=-1).abs() > _NEAR).all(-1, keepdim=True)
        if hashed_ids is not None:
            expected_ids, certain = hashed_ids, certain | True
        expected_ids = expected_ids[:, : self.topk]
        shares = scores.gather(1, expected_ids)
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        compared = _with_guard(torch, certain.expand(-1, self.topk), True)
        full_ids = _with_guard(torch, expected_ids.float(), -1.0)
        weights_output = dense_output(torch, "topk_weights", buffer, shares)
        return Trial(
            (
                Output("topk_idx", expert_ids, full_ids, compared, torch.zeros_like(compared), tolerance=0.0),
                replace(weights_output, written=weights_output.written & compared),
            )
        )

    def scores(self, torch: Any, logits: Any) -> Any:
        """Experts' scores, from their logits."""
        if self.scoring == "sigmoid":
            return torch.sigmoid(logits)
        return logits if self.scoring == "identity" else torch.nn.functional.softplus(logits).sqrt()


def _with_guard(torch: Any, rows: Any, behind: Any) -> Any:
    """``rows`` [M, …] and `GUARD_ROWS` more that hold ``behind``."""
    return torch.cat((rows, rows.new_full((GUARD_ROWS, rows.shape[1]), behind)))
