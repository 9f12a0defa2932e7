"""The report's charts: Vega-Lite specifications, made with Altair. The page's script adds colours and width."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from cachebuilder.compiling.record import BuildRecord, CompilerCall
from cachebuilder.inspecting.report.facts import Facts, KernelFacts
from cachebuilder.ops.trial import TOLERANCE
from cachebuilder.verifying.report import GpuReport

#: The relative error of BF16's rounding to 8 bits of significand: the output's type alone costs it (`ops.trial`).
_BF16_ROUNDING = 1.7e-3
#: Pixels of a band in the map of kernels, and of a job in the timeline.
_BAND, _LANE = 46, 22
#: The lines in the chart of times, and the field of a trial that holds the microseconds.
_TIMED = {"DeepGEMM": "microseconds", "torch in BF16": "reference"}

_TRIAL_TOOLTIPS = [
    alt.Tooltip("op:N"),
    alt.Tooltip("point:N"),
    alt.Tooltip("error:Q", format=".2e", title="relative error"),
    alt.Tooltip("microseconds:Q", format=".1f", title="µs"),
    alt.Tooltip("kernels:N"),
]

#: A Vega-Lite specification.
Spec = dict[str, Any]


def kernel_map(facts: Facts, op: int) -> Spec:
    """Which kernel serves which M of one op: a band of colours for each kernel family and SM count."""
    variable = facts.ops[op].variable
    selected = facts.kernels_of(op)
    several_sm_counts = len({selection.sm_count for _, selection in selected}) > 1
    order = {kernel.entry: number for number, (kernel, _) in enumerate(selected)}
    rows: list[dict[str, Any]] = [
        {
            "row": f"{kernel.name}, {selection.sm_count} SMs" if several_sm_counts else kernel.name,
            "kernel": f"{kernel.name} {kernel.short}",
            "order": order[kernel.entry],
            "first": max(points.first, 1),
            "end": points.last + points.step,
            "points": f"{points.first}–{points.last}" + (f" (step {points.step})" if points.step > 1 else ""),
            **_hover(kernel),
        }
        for kernel, selection in selected
        for points in selection.ranges
    ]
    ends = [row[end] for row in rows for end in ("first", "end")]
    labels = alt.Axis(domain=False, ticks=False, labelAlign="left", labelPadding=0, labelOffset=-20, labelLimit=400)
    hovered = alt.selection_point(fields=["order"], on="pointerover", clear="pointerout")
    bands = (
        alt.Chart(alt.InlineData(rows))
        .mark_rect(strokeWidth=0.6, cursor="pointer")
        .encode(
            x=alt.X("first:Q", scale=_log(ends), title=None, axis=alt.Axis(tickCount=8, format="d", grid=False)),
            x2="end:Q",
            y=alt.Y("row:N", title=None, scale=alt.Scale(paddingInner=0.5, paddingOuter=0.25), axis=labels),
            color=alt.Color("order:N", scale=alt.Scale(scheme="tableau20"), legend=None),
            opacity=alt.condition(hovered, alt.value(1.0), alt.value(0.3)),
            tooltip=[alt.Tooltip("kernel:N"), alt.Tooltip("points:N", title=variable), *_tooltips(rows)],
        )
        .add_params(hovered)
    )
    return _spec(bands.properties(height=_BAND * len({row["row"] for row in rows})))


def size_by_op(facts: Facts) -> Spec:
    """Cubin bytes of the kernels that each op asks for; a kernel of two ops counts for both."""
    rows: list[dict[str, Any]] = []
    for number, op in enumerate(facts.ops):
        kernels = {kernel.entry: kernel for kernel, _ in facts.kernels_of(number)}.values()
        if kernels:
            kilobytes = sum(kernel.size or 0 for kernel in kernels) / 1000
            label = f"{number}: {op.title}"
            rows.append({"op": label, "family": op.op, "kilobytes": kilobytes, "kernels": len(kernels)})
    # The labels stand above the bars, inside the plot: a phone has no room beside it.
    labels = alt.Axis(
        domain=False, ticks=False, labelAlign="left", labelPadding=-2, labelOffset=-12, labelLimit=600, zindex=1
    )
    bars = (
        alt.Chart(alt.InlineData(rows))
        .mark_bar(height=10)
        .encode(
            x=alt.X("kilobytes:Q", title="kB of cubins", axis=alt.Axis(tickCount=5)),
            y=alt.Y("op:N", title=None, sort=[row["op"] for row in rows], axis=labels),
            color=alt.Color("family:N", legend=None),
            tooltip=["op:N", alt.Tooltip("kilobytes:Q", format=",.1f", title="kB"), "kernels:Q"],
        )
    )
    return _spec(bars.properties(height=36 * len(rows)))


def timeline(facts: Facts, record: BuildRecord) -> Spec:
    """Which compiler ran when on which of the parallel jobs, cut into nvcc's phases where nvcc reported them."""
    kernels = {kernel.entry: kernel for kernel in facts.kernels}
    rows = [row for run in record.runs for row in _phases(run, kernels)]
    ticks = alt.Axis(tickCount=8)
    seconds = [alt.Tooltip(f"{field}:Q", format=".2f") for field in ("seconds", "start")]
    bars = (
        alt.Chart(alt.InlineData(rows))
        .mark_rect(strokeWidth=0.4)
        .encode(
            x=alt.X("start:Q", title="seconds since compiling began", scale=alt.Scale(nice=False), axis=ticks),
            x2="end:Q",
            y=alt.Y("job:O", title="job", scale=alt.Scale(padding=0.15)),
            color=alt.Color("phase:N", legend=alt.Legend(orient="top", title=None, columns=3)),
            tooltip=["phase:N", "what:N", *seconds, "job:O"],
        )
    )
    return _spec(bars.properties(height=max(_LANE * record.jobs, 80)))


def errors(verified: GpuReport) -> Spec:
    """Each trial's relative error against M, the largest that is accepted, and that of BF16's rounding alone."""
    rows = [row for row in _trials(verified) if row["error"] is not None]
    limits = [
        {"limit": "accepted at most", "error": TOLERANCE},
        {"limit": "BF16's own rounding", "error": _BF16_ROUNDING},
    ]
    points = (
        alt.Chart(alt.InlineData(rows))
        .mark_circle(size=36, opacity=0.8)
        .encode(
            x=_over_m(rows),
            y=alt.Y("error:Q", title="relative error", axis=alt.Axis(format=".0e", tickCount=5)),
            color=_op_colour(),
            tooltip=_TRIAL_TOOLTIPS,
        )
    )
    rules = alt.Chart(alt.InlineData(limits)).mark_rule(strokeDash=[5, 3]).encode(y="error:Q")
    names = (
        alt.Chart(alt.InlineData(limits))
        .mark_text(align="right", baseline="bottom", dx=-2, dy=-2)
        .encode(x=alt.value("width"), y="error:Q", text="limit:N")
    )
    return _spec(alt.layer(points, rules, names).properties(height=260))


def times(verified: GpuReport) -> Spec:
    """Each trial's time against M, and that of torch in BF16 for the same product, where it was measured."""
    rows = [
        row | {"by": by, "microseconds": row[field]}
        for by, field in _TIMED.items()
        for row in _trials(verified)
        if row[field] is not None
    ]
    names = [by for by in _TIMED if any(row["by"] == by for row in rows)]
    dashes = alt.Scale(domain=names, range=[[1, 0], [4, 3]][: len(names)])
    ticks = alt.Axis(tickCount=5, gridOpacity=0.4)
    lines = (
        alt.Chart(alt.InlineData(rows))
        .mark_line(strokeWidth=1, point=alt.OverlayMarkDef(size=24))
        .encode(
            x=_over_m(rows),
            y=alt.Y("microseconds:Q", scale=alt.Scale(type="log"), title="µs", axis=ticks),
            color=_op_colour(),
            strokeDash=alt.StrokeDash("by:N", scale=dashes, legend=_stroke_legend() if len(names) > 1 else None),
            detail="sms:N",
            tooltip=["by:N", *_TRIAL_TOOLTIPS],
        )
    )
    return _spec(lines.properties(height=260))


def _spec(chart: Any) -> Spec:
    """The chart, as wide as the page's column. No data has a generated name: equal reports have equal bytes."""
    with alt.data_transformers.enable(consolidate_datasets=False, max_rows=None):
        spec: Spec = chart.properties(width="container").to_dict()
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def _hover(kernel: KernelFacts) -> dict[str, object]:
    shown: dict[str, object] = dict(kernel.highlights)
    if kernel.size is not None:
        shown["cubin"] = f"{kernel.size / 1000:.1f} kB"
    if kernel.resources is not None:
        shown["registers"] = kernel.resources.registers
        shown["shared"] = f"{kernel.resources.shared_bytes} B static"
        shown["threads"] = kernel.resources.threads or "any"
    return shown


def _tooltips(rows: Sequence[dict[str, object]]) -> list[alt.Tooltip]:
    """The fields of `_hover` that at least one of these rows has."""
    names = dict.fromkeys(name for row in rows for name in row)
    shown = ("block", "stages", "cluster", "cubin", "registers", "shared", "threads")
    titles = {"shared": "shared memory", "block": "block M×N×K"}
    return [alt.Tooltip(f"{name}:N", title=titles.get(name, name)) for name in shown if name in names]


def _log(values: Iterable[float], padding: int = 0) -> alt.Scale:
    """A logarithmic scale from the least to the largest of these values."""
    ordered = sorted(values) or [1]
    return alt.Scale(type="log", base=2, domain=[ordered[0], ordered[-1]], nice=False, padding=padding)


def _over_m(rows: Sequence[dict[str, Any]]) -> alt.X:
    scale = _log((row["value"] for row in rows), padding=6)
    return alt.X("value:Q", scale=scale, title="M", axis=alt.Axis(tickCount=8, format="d"))


def _phases(run: CompilerCall, kernels: dict[str, KernelFacts]) -> list[dict[str, object]]:
    """A run, cut into nvcc's phases one after another; the rest of its time is nvcc's own.

    A held front end reports no phases.
    """
    if len(run.entries) == 1:
        kernel = kernels.get(run.entries[0])
        what = f"{kernel.name} {kernel.short}" if kernel else run.entries[0]
    else:
        what = f"{len(run.entries)} kernels in one source"
    pieces = [(phase.name, phase.seconds) for phase in run.phases if not phase.name.startswith("nvcc")]
    rest = run.seconds - sum(seconds for _, seconds in pieces)
    whole_run = {"headers": "headers", "ptx": "cicc, forked", "cubin": "nvcc", "check": "to compare"}[run.step]
    rows: list[dict[str, object]] = []
    start = run.start
    for name, seconds in [*pieces, ("nvcc" if pieces else whole_run, max(rest, 0.0))]:
        end = start + seconds
        interval = {"start": round(start, 3), "end": round(end, 3), "seconds": seconds}
        rows.append({"job": run.job, "phase": name, "what": what, **interval})
        start = end
    return rows


def _trials(verified: GpuReport) -> list[dict[str, Any]]:
    return [
        {
            # The shape comes first, because a phone cuts the end off.
            "op": f"{re.sub(r' compiled_dims=.*', '', trial.shape)} · {trial.op}",
            "sms": f"{trial.op} {trial.shape} {trial.sm_count}",
            "point": f"{trial.variable} {trial.value}, {trial.sm_count} SMs",
            "value": max(trial.value, 1),
            "error": _finite(trial.relative_error),  # NaN of a wrong kernel: the page states its problem
            "microseconds": _finite(trial.microseconds),
            "reference": _finite(trial.reference_microseconds),
            "kernels": ", ".join(f"{entry[:-32].strip('.')} {entry[-32:][:8]}" for entry in trial.kernels),
        }
        for replay in verified.replays
        for trial in replay.trials
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _op_colour() -> alt.Color:
    legend = alt.Legend(orient="bottom", columns=1, title=None, symbolLimit=60)
    return alt.Color("op:N", scale=alt.Scale(scheme="tableau20"), legend=legend)


def _stroke_legend() -> alt.Legend:
    """A legend of dashes, in a grey that is visible on white and on black."""
    lines: Spec = {"symbolType": "stroke", "symbolStrokeColor": "#888", "symbolStrokeWidth": 2, "symbolSize": 400}
    return alt.Legend(orient="top", title=None, symbolFillColor="transparent", **lines)
