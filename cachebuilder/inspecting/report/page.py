"""The report's page: one HTML file with its charts, its data and the script that draws them; it loads nothing."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import vl_convert
from markupsafe import Markup

from cachebuilder.common.version import __version__
from cachebuilder.inspecting.report import charts
from cachebuilder.inspecting.report.facts import Changes, Facts


def render(facts: Facts, changes: Changes | None = None) -> str:
    """The page's HTML. Equal facts give equal pages."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["size"] = _size
    environment.filters["ranges"] = _ranges
    drawn = _charts(facts)
    return environment.get_template("page.html").render(
        facts=facts,
        changes=changes,
        specs=drawn,
        spec_json=_script_json(drawn),
        library=_script(library()),
        version=__version__,
    )


def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, out of vl-convert."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _charts(facts: Facts) -> dict[str, charts.Spec]:
    """Each chart by the id of its place on the page."""
    drawn = {f"map-{op}": charts.kernel_map(facts, op) for op in range(len(facts.ops)) if facts.kernels_of(op)}
    if facts.kind == "artifact":
        drawn["size"] = charts.size_by_op(facts)
    if facts.build and facts.build.runs:
        drawn["timeline"] = charts.timeline(facts, facts.build)
    if facts.verified and any(replay.trials for replay in facts.verified.replays):
        drawn["errors"] = charts.errors(facts.verified)
        drawn["times"] = charts.times(facts.verified)
    return drawn


def _script_json(value: object) -> Markup:
    """JSON that no text in it can end the script element of: an artifact's names are anybody's."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _script(code: str) -> Markup:
    """JavaScript for a script element, in which no string may end it or seem to begin another."""
    return Markup(code.replace("</script", "<\\/script").replace("<!--", "\\x3c!--"))


def _size(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _ranges(selection: object) -> str:
    points = selection.ranges  # type: ignore[attr-defined]
    return ", ".join(f"{r.first}" if r.first == r.last else f"{r.first}–{r.last}" for r in points)
