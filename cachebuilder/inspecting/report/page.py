"""The report's page: one HTML file that holds charts, data and the script that draws them, and loads nothing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jinja2
import vl_convert
from markupsafe import Markup

from cachebuilder.common.files import write_atomically
from cachebuilder.common.version import __version__
from cachebuilder.errors import ArtifactError
from cachebuilder.inspecting.report import charts
from cachebuilder.inspecting.report.facts import Changes, Facts, compare, gather
from cachebuilder.planning.selection import Selection


def write(
    output: Path, target: Path, *, against: Path | None = None, verify_report: Path | None = None
) -> tuple[Facts, int]:
    """Write the page on the artifact or the plan at ``target``.

    Args:
        against: an older artifact or plan; the page then shows what changed since.
        verify_report: what ``verify --report`` wrote; default: the report beside ``target``.

    Returns:
        what the page is about, and its size in bytes.
    """
    facts = gather(target, verify_report)
    changes = compare(gather(against), facts) if against else None
    data = render(facts, changes).encode()
    write_atomically(output, data, ArtifactError)
    return facts, len(data)


def render(facts: Facts, changes: Changes | None = None) -> str:
    """The page's HTML. Equal facts give equal pages."""
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": _size, "ranges": _ranges}
    specs = _charts(facts)
    return environment.get_template("page.html").render(
        facts=facts,
        changes=changes,
        specs=specs,
        spec_json=_script_json(specs),
        library=_script(library()),
        version=__version__,
    )


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from vl-convert."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _charts(facts: Facts) -> dict[str, charts.Spec]:
    """Each chart by the id of its place on the page."""
    specs = {f"map-{op}": charts.kernel_map(facts, op) for op in range(len(facts.ops)) if facts.kernels_of(op)}
    if facts.kind == "artifact":
        specs["size"] = charts.size_by_op(facts)
    if facts.build and facts.build.runs:
        specs["timeline"] = charts.timeline(facts, facts.build)
    if facts.verified and any(replay.trials for replay in facts.verified.replays):
        specs["errors"] = charts.errors(facts.verified)
        specs["times"] = charts.times(facts.verified)
    return specs


def _script_json(value: object) -> Markup:
    """JSON in which no text can end the script element: anybody may have chosen an artifact's names."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _script(code: str) -> Markup:
    """JavaScript for a script element, in which no string can end the element or begin another."""
    return Markup(code.replace("</script", "<\\/script").replace("<!--", "\\x3c!--"))


def _size(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _ranges(selection: Selection) -> str:
    return ", ".join(f"{r.first}" if r.first == r.last else f"{r.first}–{r.last}" for r in selection.ranges)
