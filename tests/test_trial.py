"""Trials on CPU tensors: plain torch plays DeepGEMM's part. What the comparison finds, and references no card checked."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachebuilder.ops import scaled
from cachebuilder.ops.base import OpBase
from cachebuilder.ops.catalog import OPS
from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe_sm100 import QUANTISATIONS, shared_rows
from cachebuilder.ops.mqa_logits import in_order
from cachebuilder.ops.scaled import Quantisation, quantise
from cachebuilder.ops.trial import Inputs, Output
from tests.played import PLAYED, REPRESENTATIVE, dense, device, mx, op_name, spread
from tests.played_mega_moe import MOE, blocks, nvfp4_buffer, sglang_layer, sm100_layer

pytestmark = pytest.mark.slow


def make_op(name: str, **fields: Any) -> OpBase:
    return OPS[name].model_validate({"op": name} | fields)


def played_op(name: str) -> OpBase:
    return make_op(op_name(name), **PLAYED[name][1])


@pytest.mark.parametrize("name", PLAYED)
@pytest.mark.parametrize("steps", [1, 40])
def test_a_right_result_is_found_right(name: str, steps: int) -> None:
    op, player = played_op(name), device(PLAYED[name][0])
    value = steps * op.points(player).step
    trial = op.trial(player, value, seed=value)
    assert trial.problems() == []
    assert trial.relative_error() < 3e-3


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_equal_seeds_give_equal_inputs(name: str) -> None:
    op, player = played_op(name), device(PLAYED[name][0])
    one, two, other = (op.trial(player, op.points(player).step, seed).outputs[0].expected for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_an_output_that_is_not_written_is_found(name: str) -> None:
    op = played_op(name)
    player = device(lambda *_, **__: None)
    trial = op.trial(player, 3 * op.points(player).step, seed=0)
    assert math.isnan(trial.relative_error()) and "relative error nan" in trial.problems()[0]


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_row_written_behind_the_output_is_found(name: str) -> None:
    op, function = played_op(name), PLAYED[name][0]

    @functools.wraps(function)
    def overrun(a: Any, b: Any, d: Any, *arguments: Any, **options: Any) -> None:
        function(a, b, d, *arguments, **options)
        d.as_strided((1, d.shape[-1]), (d.shape[-1], 1), d.numel()).fill_(0)

    player = device(overrun)
    trial = op.trial(player, 2 * op.points(player).step, seed=0)
    width = trial.outputs[0].actual.shape[1]
    assert trial.problems() == [f"d: {width} elements were written that must not be"]


def test_one_wrong_row_among_many_is_found() -> None:
    expected = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(1))
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
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    data, scales = quantise(torch, values, Quantisation(rows, 128, "ue8m0" if power_of_two else "float32"))
    assert data.shape == values.shape and scales.shape == (-(-200 // rows), 3)
    assert ((spread(data, scales) - values).norm() / values.norm()).item() < 0.04
    mantissas = scales.view(torch.int32) & 0x7FFFFF
    assert (mantissas == 0).all().item() == power_of_two


@pytest.mark.parametrize("units", [-3, -1, 1, 3])
def test_between_two_fp8_values_either_is_right_and_no_other(units: int) -> None:
    groups = torch.randn(64, 8, 128, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    scales = groups.abs().amax(-1, keepdim=True) / scaled.FP8_MAX
    values = groups / scales
    reciprocals = ((1 / scales).view(torch.int32) + units).view(torch.float32)
    fast = (groups * reciprocals).to(torch.float8_e4m3fn).float()
    nearest = values.to(torch.float8_e4m3fn).float()
    assert (fast != nearest).any(), "units of a reciprocal take some to the other side"
    assert torch.equal(scaled.as_near(torch, values, fast, nearest), fast)
    beside = (fast.to(torch.float8_e4m3fn).view(torch.uint8) ^ 1).view(torch.float8_e4m3fn).float()
    assert torch.equal(scaled.as_near(torch, nearest, beside, nearest), nearest), "one step off is wrong"
    nothing = torch.full_like(values, math.nan)
    assert torch.equal(scaled.as_near(torch, values, nothing, nearest), nearest)


@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize("columns", [32, 128])
def test_packed_scales_stand_for_the_same_values(columns: int, fp4: bool) -> None:
    player = device(dense)
    plain, packed = (
        scaled.random(player, Inputs(player, 1), (2, 70, 512), Quantisation(1, columns, scales, fp4))
        for scales in ("float32", "ue8m0")
    )
    data, scales = packed.pair()
    assert scales.dtype == torch.int32 and scales.shape == (2, 70, -(-512 // columns // 4))
    assert scales.stride()[-2:] == (1, 72), "MN-major, rows padded to 16 bytes"
    assert data.shape == (2, 70, 256 if fp4 else 512)
    error = (packed.values(torch) - plain.values(torch)).norm() / plain.values(torch).norm()
    assert error < (0.2 if fp4 else 0.06)
    assert torch.equal(packed.values(torch)[1], packed.values(torch, 1))


@pytest.mark.parametrize("weigh", ["sum", "activation"])
def test_routing_weights_are_where_the_installed_copy_applies_them(weigh: str) -> None:
    op = make_op("nvfp4_mega_moe", **MOE)
    player = device(sm100_layer("nvfp4", weigh))
    player.deep_gemm.NVFP4SymmBuffer = None
    assert (op.trial(player, 9, 1).problems() == []) == (weigh == "activation"), "sgl-deep-gemm's"
    player.deep_gemm.NVFP4SymmBuffer = nvfp4_buffer
    assert (op.trial(player, 9, 1).problems() == []) == (weigh == "sum"), "vLLM 0.33.0's copy's"


def test_weights_are_transformed_for_the_activations_kind() -> None:
    mma_types = []

    def transform(first: Any, second: Any, activation: str = "swiglu", mma_type: str = "fp8xfp4") -> Any:
        mma_types.append(mma_type)
        return first, second

    for name in ("fp8_fp4_mega_moe", "fp8_fp4_mega_moe fp4", "nvfp4_mega_moe", "bf16_mega_moe"):
        player = device(PLAYED[name][0])
        player.deep_gemm.transform_weights_for_mega_moe = transform
        played_op(name).trial(player, 1, 1)
    assert mma_types == ["fp8xfp4", "mxf4xmxf4", "nvfp4xnvfp4", "fp8xfp4"]


def test_outputs_sent_in_fp8_have_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_USE_FP8_COMBINE", "1")
    with pytest.raises(NotImplementedError, match="DG_USE_FP8_COMBINE"):
        make_op("bf16_mega_moe", **MOE).trial(device(sm100_layer("bf16")), 1, 1)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("nvfp4_mega_moe", {"weight_layout": "trtllm"}, "trtllm"),
        ("nvfp4_mega_moe", {"shared_experts": 1}, "shared experts in NVFP4"),
        ("fp8_fp4_mega_moe", {"shared_experts": 1, "mma_type": "mxf4xmxf4"}, "shared experts in FP4"),
    ],
)
def test_a_layout_that_no_engine_or_deepgemm_defines_has_no_reference(
    name: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(NotImplementedError, match=words):
        make_op(name, **MOE | fields).trial(device(sglang_layer("nvfp4")), 1, 1)


@pytest.mark.parametrize("block", [16, 96, 192])
def test_shared_experts_scales_are_in_pages_of_a_block(block: int) -> None:
    player = device(sm100_layer("fp8"))
    player.deep_gemm.get_block_m_for_mega_moe = lambda *_: block
    buffer = SimpleNamespace(mma_type="fp8xfp4", num_max_tokens_per_rank=512)
    order = [32 * quarter + lane for lane in range(32) for quarter in range(4)]  # what is in each row of a page
    rows = [
        token // block * -(-block // 128) * 128 + token % block // 128 * 128 + order.index(token % block % 128)
        for token in range(400)
    ]
    op = make_op("fp8_fp4_mega_moe", **MOE)
    assert shared_rows(player, op, buffer, 400).tolist() == rows  # type: ignore[arg-type]


def test_a_value_between_two_of_fp4_goes_to_the_even_code() -> None:
    middles = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -0.75, -5.0, -9.0]])
    rounded = scaled.from_fp4(torch, scaled.to_fp4(torch, middles))
    assert rounded.tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 0.0, -1.0, -4.0, -6.0]]


@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.04), ("fp4", 0.2), ("nvfp4", 0.12)])
def test_requantised_values_are_near_and_stay_as_they_are(kind: Any, most: float) -> None:
    values = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    once = scaled.requantised(torch, values, QUANTISATIONS[kind])
    assert ((once - values).norm() / values.norm()).item() < most
    if kind != "nvfp4":  # if the largest of 16 is rounded down, the next quantisation has another scale
        assert torch.equal(scaled.requantised(torch, once, QUANTISATIONS[kind]), once)


def test_nvfp4_operands_are_what_their_bytes_say() -> None:
    player = device(dense)
    operand = scaled.random(player, Inputs(player, 1), (2, 128, 256), QUANTISATIONS["nvfp4"], deviation=3.0)
    data, scales = operand.pair()
    assert data.shape == (2, 128, 128) and scales.shape == (2, 128, 4) and scales.stride()[-2:] == (1, 128)
    assert torch.equal(operand.values(torch), blocks(data, scales))
    assert operand.values(torch).std().item() == pytest.approx(3.0, rel=0.02)


def in_bf16(heads: int) -> Any:
    """Logits as SM100's kernels sum them with BF16 weights, in four sums."""

    def play(
        q: Any, kv: Any, weights: Any, starts: Any, ends: Any, clean_logits: bool, logits_dtype: Any, max_seqlen_k: int
    ) -> Any:
        products = torch.einsum("shd,td->sth", mx(q), mx(kv)).relu().bfloat16().double()
        sums = torch.zeros(*products.shape[:2], 4, dtype=torch.double)
        for head in range(0, heads, 4):
            step = products[..., head : head + 4] * weights[:, None, head : head + 4].double()
            sums = (sums + step).bfloat16().double()
        pairs = (sums[..., :2] + sums[..., 2:]).bfloat16().double()
        return pairs.sum(-1).bfloat16()

    return play


@pytest.mark.parametrize("heads", [8, 64])
def test_sums_in_bf16_are_right(heads: int) -> None:
    fields = {"heads": heads, "scales": "mx", "weights": "bfloat16", "logits": "bfloat16", "max_tokens": 64}
    op = make_op("fp8_fp4_mqa_logits", **fields)
    trials = [op.trial(device(in_bf16(heads)), rows, seed) for seed, rows in enumerate([1] * 20 + [64])]
    assert [trial.problems() for trial in trials] == [[]] * len(trials)
    assert max(trial.relative_error() for trial in trials) > 3e-3, "near enough to the bound to matter"


def sparse_schedule(places: list[list[int]], per: int, sms: int, together: int = 2) -> list[list[int]]:
    """A schedule as DeepGEMM's kernel makes one, in words: it merges the blocks of ``together`` rows at a time."""
    splits, ranges = [], []
    for row in range(0, len(places), together):
        both = places[row : row + together] + [[]] * (2 - len(places[row : row + together]))
        merged = sorted(set(both[0]) | set(both[1]))
        ranges.append((len(splits), row, len(places[row : row + together])))
        for begin in range(0, len(merged), per):
            some = merged[begin : begin + per]
            bases = [sum(place < some[0] for place in mine) for mine in both]
            infos = []
            for place in some:
                slots = [m.index(place) - base if place in m else 0xFFFF for m, base in zip(both, bases, strict=True)]
                infos += [place, slots[0] | slots[1] << 16]
            splits.append([row, len(some), *bases, *infos, *[0, 0xFFFFFFFF] * (per - len(some))])
    ends = [begin for begin, _, _ in ranges[1:]] + [len(splits)]
    entries = [[begin, end, row, count] for (begin, row, count), end in zip(ranges, ends, strict=True)]
    waves = -(-len(entries) // sms)
    entries += [[0, 0, 0, 0]] * (waves * sms - len(entries))
    return [[len(splits), waves, 0, 0], *splits, *entries]


def as_bytes(schedule: list[list[int]]) -> Any:
    return torch.tensor([word for part in schedule for word in part]).to(torch.uint32).view(torch.uint8)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize(("block", "unaligned"), [(8, False), (16, True)])
def test_a_sparse_schedule_is_right_if_it_leads_to_every_block_once(rows: int, block: int, unaligned: bool) -> None:
    op = make_op("get_sparse_mqa_logits_metadata", block=block, blocks=48, max_tokens=16, unaligned=unaligned or None)
    change: Any = lambda schedule: None  # noqa: E731

    def make(starts: Any, ends: Any, keys: int, block_ids: Any, kind: Any, size: int, use_unaligned_ks: bool) -> Any:
        counts = [min(48, -(-int(length) // size)) for length in ends - starts]
        places = [
            [number * size + int(start) % size for number in row[:count]]
            for row, start, count in zip(block_ids.tolist(), starts, counts, strict=True)
        ]
        schedule = sparse_schedule(places, 512 // size, 132)
        change(schedule)
        return as_bytes(schedule)

    player = device(dense)
    player.deep_gemm.get_sparse_mqa_logits_metadata = make
    assert op.trial(player, rows, seed=rows).problems() == []

    def another_place(schedule: Any) -> None:
        schedule[1][4] += 1

    def another_slot(schedule: Any) -> None:
        schedule[1][5] += 1

    def not_visited(schedule: Any) -> None:
        schedule[1 + schedule[0][0]][1] -= 1

    def no_schedule(schedule: Any) -> None:
        schedule[0][0] = 1 << 30

    for change in (another_place, another_slot, not_visited, no_schedule):
        assert op.trial(player, rows, seed=rows).problems() != [], change.__name__


@pytest.mark.parametrize("format", [None, "fp4"])
def test_a_paged_sparse_schedule_is_held_to_its_pages(format: str | None) -> None:
    op = make_op("get_paged_sparse_mqa_logits_metadata", block=16, blocks=64, max_batch=16, page_size=32, format=format)
    player = device(dense)
    offset = 0

    def make(lengths: Any, table: Any, rows: Any, page: int, block_ids: Any, kind: Any, size: int) -> Any:
        places = [
            [
                int(table[row, number // 2]) * 2 + number % 2 + offset
                for number in block_ids[row, : -(-int(length) // 16)]
            ]
            for row, length in enumerate(lengths)
        ]
        return as_bytes(unsorted_schedule(places, (640 if format else 512) // size))

    player.deep_gemm.get_paged_sparse_mqa_logits_metadata = make
    assert op.trial(player, 7, seed=1).problems() == []
    offset = 1
    assert op.trial(player, 7, seed=1).problems() != []


def unsorted_schedule(places: list[list[int]], per: int) -> list[list[int]]:
    """A schedule of single rows, whose places in the pages have no order."""
    splits, entries = [], []
    for row, mine in enumerate(places):
        entries.append([len(splits), len(splits) + -(-len(mine) // per), row, 1])
        for base in range(0, len(mine), per):
            infos = [word for slot, at in enumerate(mine[base : base + per]) for word in (at, slot | 0xFFFF0000)]
            splits.append([row, len(infos) // 2, base, 0xFFFFFFFF, *infos, *[0, 0xFFFFFFFF] * (per - len(infos) // 2)])
    entries += [[0, 0, 0, 0]] * (132 - len(entries))
    return [[len(splits), 1, 0, 0], *splits, *entries]


@pytest.mark.parametrize("next_n", [1, 3])
def test_sm100s_schedule_is_right_if_sms_follow_one_another(next_n: int) -> None:
    lengths = torch.tensor([300, 700, 100], dtype=torch.int32)
    right = torch.tensor([[0, 0], [0, 1], [next_n, 0], [next_n, 2], [2 * next_n, 0], [3 * next_n, 0]])
    assert in_order(torch, right, lengths, next_n).flatten().tolist() == [1.0] * 6
    for at, (row, split) in ((0, (0, 1)), (2, (0, 0)), (3, (next_n, 3)), (5, (2 * next_n, 0)), (4, (4 * next_n, 0))):
        wrong = right.clone()
        wrong[at] = torch.tensor([row, split])
        assert in_order(torch, wrong, lengths, next_n).flatten().tolist() != [1.0] * 6


def test_a_packed_layout_is_held_to_its_exponents() -> None:
    op = make_op("transform_sf_into_required_layout", k=1024, recipe=[128, 128], max_tokens=300)

    def transform(sf: Any, mn: int, *_: Any) -> Any:
        rows = sf.repeat_interleave(128, 0)[:mn].contiguous()
        exponents = (rows.view(torch.int32) >> 23).to(torch.uint8)
        return exponents.view(torch.int32)

    player = Device(torch, SimpleNamespace(transform_sf_into_required_layout=transform), "cpu")  # type: ignore[arg-type]
    assert op.trial(player, 300, 1).problems() == []
    player.deep_gemm.transform_sf_into_required_layout = lambda *a: transform(*a) + 1
    assert op.trial(player, 300, 1).problems() != []


def test_rows_of_experts_are_as_engines_lay_them_out() -> None:
    rows = Inputs(device(dense), 3).expert_rows(32 * 128, 4, 128)
    blocks = rows.view(32, 128)
    owners = blocks[:, 0]
    assert (owners[-4:] == -1).all() and (owners[:-4].diff() >= 0).all() and (owners[:-4] >= 0).all()
    for owner, block in zip(owners, blocks, strict=True):
        assert set(block.tolist()) <= {int(owner), -1}
        assert (block[:-1] >= block[1:]).all(), "padding comes last"
