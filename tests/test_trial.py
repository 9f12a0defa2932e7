"""The references that a real GPU's results are held to, on CPU tensors: DeepGEMM's part is played by plain torch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from cachebuilder.ops import OPS, scaled
from cachebuilder.ops.base import Device
from cachebuilder.ops.scaled import quantise
from cachebuilder.ops.trial import Inputs, Output

torch = pytest.importorskip("torch")


def spread(data: Any, scales: Any) -> Any:
    """Dequantised another way than `Scaled.values`: element by element."""
    m, k = data.shape[-2:]
    rows = torch.arange(m) // (1 if scales.shape[-2] == m else 128)
    return data.float() * scales[..., rows, :][..., torch.arange(k) // 128]


def dense(a: Any, b: Any, d: Any, **_: Any) -> None:
    a, b = (spread(*x) if isinstance(x, tuple) else x.float() for x in (a, b))
    d.copy_(a @ b.mT)


def contiguous(a: Any, b: Any, d: Any, expert_of_row: Any, **_: Any) -> None:
    a, b = (spread(*x) if isinstance(x, tuple) else x.float() for x in (a, b))
    d.fill_(7)  # what a kernel does with padding rows is its own business
    for row, expert in enumerate(expert_of_row.tolist()):
        if expert >= 0:
            d[row] = b[expert] @ a[row]


def masked(a: Any, b: Any, d: Any, counts: Any, expected_m: int, **_: Any) -> None:
    a, b = (spread(*x) if isinstance(x, tuple) else x.float() for x in (a, b))
    for expert, count in enumerate(counts.tolist()):
        tile = min(-(-count // 256) * 256, d.shape[1])
        d[expert, :tile] = (a[expert] @ b[expert].mT)[:tile]


PLAYED = {
    "fp8_gemm_nt": (dense, {"n": 256, "k": 384, "max_tokens": 64}),
    "bf16_gemm_nt": (dense, {"n": 256, "k": 384, "max_tokens": 64, "out_dtype": "float32"}),
    "m_grouped_fp8_gemm_nt_contiguous": (contiguous, {"experts": 3, "topk": 2, "n": 128, "k": 256, "max_tokens": 400}),
    "m_grouped_bf16_gemm_nt_contiguous": (contiguous, {"experts": 3, "topk": 2, "n": 128, "k": 256, "max_tokens": 400}),
    "m_grouped_fp8_gemm_nt_masked": (masked, {"experts": 3, "max_m": 512, "n": 128, "k": 256}),
    "m_grouped_bf16_gemm_nt_masked": (masked, {"experts": 3, "max_m": 512, "n": 128, "k": 256}),
}


def device(function: Any) -> Device:
    functions = dict.fromkeys(PLAYED, function) | {"get_mk_alignment_for_contiguous_layout": lambda: 128}
    return Device(torch, SimpleNamespace(**functions), "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PLAYED)
@pytest.mark.parametrize("value", [1, 2, 40])
def test_a_right_result_is_found_right(name: str, value: int) -> None:
    function, fields = PLAYED[name]
    op = OPS[name].model_validate({"op": name} | fields)
    there = device(function)
    value *= op.points(there).step
    trial = op.trial(there, value, seed=value)
    assert trial.problems() == []
    assert trial.relative_error() < 3e-3


@pytest.mark.parametrize("name", PLAYED)
def test_equal_seeds_give_equal_inputs(name: str) -> None:
    function, fields = PLAYED[name]
    op = OPS[name].model_validate({"op": name} | fields)
    there = device(function)
    one, two, other = (op.trial(there, op.points(there).step, seed).outputs[0].expected for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("name", PLAYED)
def test_nothing_written_is_found(name: str) -> None:
    fields = PLAYED[name][1]
    op = OPS[name].model_validate({"op": name} | fields)
    there = device(lambda *_, **__: None)
    trial = op.trial(there, 3 * op.points(there).step, seed=0)
    assert math.isnan(trial.relative_error()) and "relative error nan" in trial.problems()[0]


@pytest.mark.parametrize("name", PLAYED)
def test_a_row_written_behind_the_output_is_found(name: str) -> None:
    function, fields = PLAYED[name]
    op = OPS[name].model_validate({"op": name} | fields)

    def overrun(a: Any, b: Any, d: Any, *rest: Any, **options: Any) -> None:
        function(a, b, d, *rest, **options)
        d.as_strided((1, d.shape[-1]), (d.shape[-1], 1), d.numel()).fill_(0)

    there = device(overrun)
    trial = op.trial(there, 2 * op.points(there).step, seed=0)
    assert trial.problems() == [f"d: {fields['n']} elements were written that must not be"]


def test_one_wrong_row_among_many_is_found() -> None:
    expected = torch.randn(40_000, 8)
    actual = expected.clone()
    actual[1234, 0] += 1.0
    everything, nothing = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    output = Output("d", actual, expected, everything, nothing)
    assert output.relative_error() < output.tolerance
    assert "in one row" in str(output.problem())


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows", [1, 128])
def test_quantised_values_are_near_and_their_scales_are_what_the_architecture_keeps(
    rows: int, power_of_two: bool
) -> None:
    values = torch.randn(200, 300)
    data, scales = quantise(torch, values, (rows, 128), power_of_two, False)
    assert data.shape == values.shape and scales.shape == (-(-200 // rows), 3)
    assert ((spread(data, scales) - values).norm() / values.norm()).item() < 0.04
    mantissas = scales.view(torch.int32) & 0x7FFFFF
    assert (mantissas == 0).all().item() == power_of_two


@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize("columns", [32, 128])
def test_packed_scales_stand_for_the_same_values(columns: int, fp4: bool) -> None:
    there = device(dense)
    plain, packed = (
        scaled.random(there, Inputs(there, 1), (2, 70, 512), (1, columns), packed, fp4) for packed in (False, True)
    )
    data, scales = packed.pair()
    assert scales.dtype == torch.int32 and scales.shape == (2, 70, -(-512 // columns // 4))
    assert scales.stride()[-2:] == (1, 72), "MN-major, rows padded to 16 bytes"
    assert data.shape == (2, 70, 256 if fp4 else 512)
    error = (packed.values(torch) - plain.values(torch)).norm() / plain.values(torch).norm()
    assert error < (0.2 if fp4 else 0.06)
    assert torch.equal(packed.values(torch)[1], packed.values(torch, 1))


def test_rows_of_experts_are_as_engines_lay_them_out() -> None:
    rows = Inputs(device(dense), 3).expert_rows(32 * 128, 4, 128)
    blocks = rows.view(32, 128)
    owners = blocks[:, 0]
    assert (owners[-4:] == -1).all() and (owners[:-4].diff() >= 0).all() and (owners[:-4] >= 0).all()
    for owner, block in zip(owners, blocks, strict=True):
        assert set(block.tolist()) <= {int(owner), -1}
        assert (block[:-1] >= block[1:]).all(), "padding comes last"
