"""The references that a real GPU's results are held to, on CPU tensors: DeepGEMM's part is played by plain torch."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from cachebuilder.ops import OPS, scaled
from cachebuilder.ops.base import Device
from cachebuilder.ops.get_paged_mqa_logits_metadata import sm90_schedule
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


def values(operand: Any) -> Any:
    return spread(*operand) if isinstance(operand, tuple) else operand.float()


def batched(expr: str, a: Any, b: Any, d: Any, **_: Any) -> None:
    if isinstance(a, tuple):
        a = a[0], a[1].permute(1, 0, 2)  # one matrix for each group
        d.copy_(torch.einsum("hbr,hdr->bhd", values((a[0].permute(1, 0, 2), a[1])), values(b)))
    else:
        d.copy_(torch.einsum(expr, a.float(), b.float()))


def prenorm(a: Any, b: Any, d: Any, squares: Any, splits: int) -> None:
    for index, columns in enumerate(torch.arange(a.shape[1]).tensor_split(splits)):
        d[index] = a[:, columns].float() @ b[:, columns].mT
        squares[index] = a[:, columns].float().square().sum(1)


def skip_mid(a: Any, b: Any, d: Any, heads: tuple[int, int, int], **_: Any) -> None:
    left, mid, right = heads
    product = (values(a) @ values(b).mT).view(len(d), -1, left + right)
    whole = d.view(len(d), -1, left + mid + right)
    whole[..., :left], whole[..., left + mid :] = product[..., :left], product[..., left:]


def one_by_one(q: Any, k: Any, weights: Any) -> Any:
    """Logits [rows, keys] by the definition, another way than `expected_logits`."""
    return (torch.einsum("shd,td->sht", q, k).relu() * weights.float()[..., None]).sum(1)


def logits(
    q: Any, kv: Any, weights: Any, starts: Any, ends: Any, clean_logits: bool = False, max_seqlen_k: int = 0
) -> Any:
    q = q[0] if isinstance(q, tuple) else q
    found = one_by_one(q.float(), kv[0].float() * kv[1][:, None], weights)
    if max_seqlen_k:
        found = torch.stack([row.roll(-int(start)) for row, start in zip(found, starts, strict=True)])
    return found


def paged(
    q: Any, cache: Any, weights: Any, lengths: Any, table: Any, schedule: Any, most: int, clean_logits: bool = False
) -> Any:
    q = (q[0] if isinstance(q, tuple) else q).float()
    pages, size, _, width = cache.shape
    flat, dim = cache.view(pages, -1), width - 4
    keys = flat[:, : size * dim].view(torch.float8_e4m3fn).float().view(pages, size, dim)
    keys = keys * flat[:, size * dim :].view(torch.float32)[..., None]
    rows = [
        one_by_one(q[i], keys[table[i].long()].flatten(0, 1), weights.view(len(q), -1, q.shape[2])[i])
        for i in range(len(q))
    ]
    return torch.cat(rows)[:, :most]


def mx(pair: Any, width: int = 128) -> Any:
    """Values of data […, D] whose scales are four exponents in an int32."""
    data, scales = pair
    exponents = scales.contiguous().view(torch.uint8).view(*scales.shape, 4).int()
    return data.float() * (exponents - 127).float().exp2().repeat_interleave(width // 4, -1)


def sparse(q: Any, kv: Any, weights: Any, schedule: Any, blocks: int, block: int, use_unaligned_ks: bool) -> Any:
    """The schedule stands for what DeepGEMM's holds: starts and blocks of each row."""
    starts, chosen = schedule
    queries, keys = mx(q), mx(kv)
    logits = torch.zeros(len(weights), blocks * block)
    for row, own in enumerate(chosen.tolist()):
        whole = one_by_one(queries[row : row + 1], keys, weights[row : row + 1])[0]
        for j, number in enumerate(own):
            at = number * block + int(starts[row]) % block
            logits[row, j * block : (j + 1) * block] = whole[at : at + block]
    return logits


def paged_sparse(q: Any, cache: Any, weights: Any, schedule: Any, blocks: int, block: int) -> Any:
    table, chosen = schedule
    pages, size, _, width = cache.shape
    whole_pages = torch.stack(
        [cache[page].as_strided((size * width,), (1,), cache[page].storage_offset()) for page in range(pages)]
    )
    data = whole_pages[:, : size * 128].reshape(pages, size, 128).contiguous().view(torch.float8_e4m3fn)
    scales = whole_pages[:, size * 128 :].contiguous().view(torch.int32)
    rows = [
        sparse((q[0][i : i + 1, 0], q[1][i : i + 1, 0]), (data[own].flatten(0, 1), scales[own].flatten()),
               weights[i : i + 1], (torch.zeros(1), chosen[i : i + 1]), blocks, block, False)
        for i, own in enumerate(table.long())
    ]  # fmt: skip
    return torch.cat(rows)


def k_grouped(a: Any, b: Any, d: Any, ks: Any, layout: Any, c: Any, **_: Any) -> None:
    scales = lambda x: x[1].repeat_interleave(128, 0) if isinstance(x, tuple) else 1.0  # noqa: E731
    data = lambda x: (x[0] if isinstance(x, tuple) else x).float()  # noqa: E731
    for expert, (left, right) in enumerate(
        zip((data(a) * scales(a)).split(ks), (data(b) * scales(b)).split(ks), strict=True)
    ):
        d[expert] += left.mT @ right


def accumulating(a: Any, b: Any, d: Any, c: Any, **_: Any) -> None:
    d += values(a) @ values(b).mT


def nn(a: Any, b: Any, d: Any, **_: Any) -> None:
    d.copy_(a.float() @ b.float())


def mega_buffer(group: Any, experts: int, tokens: int, topk: int, hidden: int, intermediate: int) -> Any:
    tokens = -(-tokens // 128) * 128
    return SimpleNamespace(
        x=torch.zeros(tokens, hidden, dtype=torch.int8),
        x_sf=torch.zeros(tokens, hidden // 128),
        topk_idx=torch.zeros(tokens, topk, dtype=torch.int64),
        topk_weights=torch.zeros(tokens, topk),
    )


def mega_moe(y: Any, first: Any, second: Any, there: Any, activation_clamp: float | None) -> None:
    """One token and one expert at a time."""
    x = spread(there.x.view(torch.float8_e4m3fn), there.x_sf)
    first, second = spread(*first), spread(*second)
    limit = activation_clamp or math.inf
    for token in range(len(y)):
        total = torch.zeros(y.shape[1])
        for expert, weight in zip(there.topk_idx[token].tolist(), there.topk_weights[token].tolist(), strict=True):
            both = first[expert] @ x[token]
            gate, up = both[: len(both) // 2].clamp(max=limit), both[len(both) // 2 :].clamp(-limit, limit)
            blocks = (gate / (1 + (-gate).exp()) * up * weight).view(-1, 64)
            scale = blocks.abs().max(1, keepdim=True).values / 448
            total += (second[expert] @ ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten()).bfloat16()
        y[token] = total


def sm90_pre_dispatch(x: Any, chosen: Any, weights: Any, into: Any, sf: Any, ids: Any, ws: Any, tokens: int) -> None:
    blocks = x.float().view(tokens, -1, 128)
    sf[:tokens] = blocks.abs().amax(-1) / 448
    into[:tokens] = (blocks / sf[:tokens, :, None]).flatten(1).to(torch.float8_e4m3fn)
    ids.fill_(-1), ws.fill_(0)
    ids[:tokens], ws[:tokens] = chosen, weights


MOE = {"ranks": 1, "experts": 8, "topk": 2, "hidden": 256, "intermediate": 128, "max_tokens": 64}
PLAYED: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8_gemm_nt accumulating": (
        accumulating,
        {"n": 256, "k": 384, "max_tokens": 64, "out_dtype": "float32", "accumulate": True},
    ),
    "bf16_gemm_nn": (nn, {"n": 256, "k": 384, "max_tokens": 64}),
    "einsum": (batched, {"expr": "bhd,hdr->bhr", "h": 3, "d": 64, "r": 128, "max_tokens": 64}),
    "fp8_einsum": (batched, {"h": 3, "d": 256, "r": 384, "max_tokens": 64}),
    "tf32_hc_prenorm_gemm": (prenorm, {"n": 24, "k": 1024, "max_tokens": 64}),
    "fp8_gemm_nt_skip_head_mid": (skip_mid, {"n": 256, "k": 384, "left": 64, "mid": 32, "right": 64, "max_tokens": 64}),
    "fp8_mqa_logits": (logits, {"heads": 32, "max_tokens": 64}),
    "fp8_fp4_mqa_logits": (logits, {"heads": 32, "max_tokens": 64, "compressed": True}),
    "fp8_paged_mqa_logits": (paged, {"heads": 32, "max_batch": 40, "next_n": 2}),
    "fp8_fp4_sparse_mqa_logits": (sparse, {"heads": 8, "block": 16, "blocks": 32, "unaligned": True, "max_tokens": 64}),
    "fp8_fp4_sparse_mqa_logits aligned": (sparse, {"heads": 8, "block": 8, "blocks": 132, "max_tokens": 64}),
    "fp8_fp4_paged_sparse_mqa_logits": (paged_sparse, {"heads": 8, "block": 16, "blocks": 32, "max_batch": 64}),
    "k_grouped_bf16_gemm_tn_contiguous": (k_grouped, {"experts": 3, "m": 64, "n": 32, "max_k": 512}),
    "k_grouped_fp8_gemm_tn_contiguous": (k_grouped, {"experts": 3, "m": 64, "n": 32, "max_k": 512}),
    "fp8_mega_moe": (mega_moe, MOE),
    "fp8_mega_moe clamped": (mega_moe, MOE | {"activation_clamp": 7.0}),
    "mega_moe_pre_dispatch_sm90": (sm90_pre_dispatch, MOE),
    "fp8_gemm_nt": (dense, {"n": 256, "k": 384, "max_tokens": 64}),
    "bf16_gemm_nt": (dense, {"n": 256, "k": 384, "max_tokens": 64, "out_dtype": "float32"}),
    "m_grouped_fp8_gemm_nt_contiguous": (contiguous, {"experts": 3, "topk": 2, "n": 128, "k": 256, "max_tokens": 400}),
    "m_grouped_bf16_gemm_nt_contiguous": (contiguous, {"experts": 3, "topk": 2, "n": 128, "k": 256, "max_tokens": 400}),
    "m_grouped_fp8_gemm_nt_masked": (masked, {"experts": 3, "max_m": 512, "n": 128, "k": 256}),
    "m_grouped_bf16_gemm_nt_masked": (masked, {"experts": 3, "max_m": 512, "n": 128, "k": 256}),
}


def op_name(played: str) -> str:
    return played.split()[0]


def device(function: Any) -> Device:
    functions = dict.fromkeys(map(op_name, PLAYED), function) | {
        "get_mk_alignment_for_contiguous_layout": lambda: 128,
        "get_num_sms": lambda: 132,
        "get_sparse_mqa_logits_metadata": lambda starts, ends, keys, chosen, *_, **__: (starts, chosen),
        "get_paged_sparse_mqa_logits_metadata": lambda lengths, table, rows, page, chosen, *_: (table, chosen),
        "get_symm_buffer_for_sm90_mega_moe": mega_buffer,
        "transform_weights_for_mega_moe_sm90": lambda first, second: (first, second),
        "get_paged_mqa_logits_metadata": lambda lengths, page, slots: torch.zeros(slots + 1, 2, dtype=torch.int32),
    }
    return Device(torch, SimpleNamespace(**functions), "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PLAYED)
@pytest.mark.parametrize("value", [1, 2, 40])
def test_a_right_result_is_found_right(name: str, value: int) -> None:
    function, fields = PLAYED[name]
    op = OPS[op_name(name)].model_validate({"op": op_name(name)} | fields)
    there = device(function)
    value *= op.points(there).step
    trial = op.trial(there, value, seed=value)
    assert trial.problems() == []
    assert trial.relative_error() < 3e-3


@pytest.mark.parametrize("name", PLAYED)
def test_equal_seeds_give_equal_inputs(name: str) -> None:
    function, fields = PLAYED[name]
    op = OPS[op_name(name)].model_validate({"op": op_name(name)} | fields)
    there = device(function)
    one, two, other = (op.trial(there, op.points(there).step, seed).outputs[0].expected for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)


#: Those whose output the caller allocates, and that do not add to what it held.
FILLED = [name for name in PLAYED if "logits" not in name and "k_grouped" not in name and "accumulating" not in name]
#: Of these, the ones with a single output.
ONE_OUTPUT = [name for name in FILLED if name != "tf32_hc_prenorm_gemm" and "dispatch" not in name]


@pytest.mark.parametrize("name", FILLED)
def test_nothing_written_is_found(name: str) -> None:
    fields = PLAYED[name][1]
    op = OPS[op_name(name)].model_validate({"op": op_name(name)} | fields)
    there = device(lambda *_, **__: None)
    trial = op.trial(there, 3 * op.points(there).step, seed=0)
    assert math.isnan(trial.relative_error()) and "relative error nan" in trial.problems()[0]


@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_a_row_written_behind_the_output_is_found(name: str) -> None:
    function, fields = PLAYED[name]
    op = OPS[op_name(name)].model_validate({"op": op_name(name)} | fields)

    def overrun(*arguments: Any, **options: Any) -> None:
        function(*arguments, **options)
        d = arguments[3] if isinstance(arguments[0], str) else arguments[0 if "moe" in name else 2]
        d.as_strided((1, d.shape[-1]), (d.shape[-1], 1), d.numel()).fill_(0)

    there = device(overrun)
    trial = op.trial(there, 2 * op.points(there).step, seed=0)
    width = trial.outputs[0].actual.shape[1]
    assert trial.problems() == [f"{trial.outputs[0].name}: {width} elements were written that must not be"]


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


def test_between_two_fp8_values_either_is_right_and_no_other() -> None:
    torch.manual_seed(1)
    groups = torch.randn(64, 8, 128).bfloat16().float()
    scales = groups.abs().amax(-1, keepdim=True) / scaled.FP8_MAX
    values = groups / scales
    fast = (groups * torch.nextafter(1 / scales, torch.tensor(math.inf))).to(torch.float8_e4m3fn).float()
    nearest = values.to(torch.float8_e4m3fn).float()
    assert (fast != nearest).any(), "one unit of a reciprocal takes some to the other side"
    assert torch.equal(scaled.as_near(torch, values, fast), fast)
    beside = (fast.to(torch.float8_e4m3fn).view(torch.uint8) ^ 1).view(torch.float8_e4m3fn)
    assert torch.equal(scaled.as_near(torch, nearest, beside), nearest), "one step off is wrong"
    nothing = torch.full_like(values, math.nan).to(torch.float8_e4m3fn)
    assert torch.equal(scaled.as_near(torch, values, nothing), nearest)


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


@pytest.mark.parametrize("name", ["fp8_mqa_logits", "fp8_paged_mqa_logits"])
def test_wrong_logits_are_found(name: str) -> None:
    function, fields = PLAYED[name]
    op = OPS[name].model_validate({"op": name} | fields)
    trial = op.trial(device(lambda *a, **b: function(*a, **b) * 1.01), 5, seed=0)
    assert "relative error 1.00e-02" in trial.problems()[0]


@pytest.mark.parametrize("batch", [1, 33, 500])
def test_a_schedule_gives_every_sm_the_splits_that_follow(batch: int) -> None:
    lengths = Inputs(device(dense), batch).integers(1, 8192, batch)
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + -(-length // 256))
    schedule = sm90_schedule(lengths, 132, 1)
    starts = [begins[at] + split for at, split in schedule]
    assert starts[0] == 0 and starts[-1] == begins[-1] and schedule[-1] == (batch, 0)
    shares = [b - a for a, b in itertools.pairwise(starts)]
    assert max(shares) - min(shares) <= 1 and sum(shares) == begins[-1]
    assert all(at == batch or split < begins[at + 1] - begins[at] for at, split in schedule)


def test_a_packed_layout_is_held_to_its_exponents() -> None:
    op = OPS["transform_sf_into_required_layout"].model_validate(
        {"op": "transform_sf_into_required_layout", "k": 1024, "recipe": [128, 128], "max_tokens": 300}
    )

    def transform(sf: Any, mn: int, *_: Any) -> Any:
        rows = sf.repeat_interleave(128, 0)[:mn].contiguous()
        exponents = (rows.view(torch.int32) >> 23).to(torch.uint8)
        return exponents.view(torch.int32)

    there = Device(torch, SimpleNamespace(transform_sf_into_required_layout=transform), "cpu")  # type: ignore[arg-type]
    assert op.trial(there, 300, 1).problems() == []
    there.deep_gemm.transform_sf_into_required_layout = lambda *a: transform(*a) + 1
    assert op.trial(there, 300, 1).problems() != []


def test_rows_of_experts_are_as_engines_lay_them_out() -> None:
    rows = Inputs(device(dense), 3).expert_rows(32 * 128, 4, 128)
    blocks = rows.view(32, 128)
    owners = blocks[:, 0]
    assert (owners[-4:] == -1).all() and (owners[:-4].diff() >= 0).all() and (owners[:-4] >= 0).all()
    for owner, block in zip(owners, blocks, strict=True):
        assert set(block.tolist()) <= {int(owner), -1}
        assert (block[:-1] >= block[1:]).all(), "padding comes last"


@pytest.mark.parametrize("name", ["fp8_gemm_nt", "bf16_gemm_nt"])
def test_a_dense_op_has_a_call_of_torch_to_time_beside_it(name: str) -> None:
    op = OPS[name].model_validate({"op": name} | PLAYED[name][1])
    reference = op.reference(device(dense))
    assert reference is not None
    for m in (1, 64):
        reference(m)
