"""The misses as Prometheus reads them: its text format, for node_exporter's textfile collector.

prometheus_client writes the format. vLLM and SGLang bring it; elsewhere it is the extra ``metrics``.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

from cachebuilder.restoring.miss_log import LABELS, Tally


def exposition(tally: Tally, labels: Mapping[str, str]) -> str:
    """The metrics of a tally. All but those of each kernel are there if nothing was missed, so that alerts work.

    Args:
        labels: names and values that every metric gets, in addition to its own.
    """
    disable_created_metrics()  # no log says when its counts began
    registry = CollectorRegistry()
    names, values = tuple(labels), tuple(labels.values())

    def gauge(name: str, text: str, value: int) -> None:
        metric = Gauge(name, text, names, registry=registry)
        (metric.labels(*values) if names else metric).set(value)

    def counter(name: str, text: str, value: int) -> None:
        metric = Counter(name, text, names, registry=registry)
        (metric.labels(*values) if names else metric).inc(value)

    requests = "Requests to compile a kernel that the restored cache lacks"
    counter("cachebuilder_misses", f"{requests}.", tally.requests.total())
    text = f"{requests}, by kernel, artifact and policy."
    kernels = Counter("cachebuilder_kernel_misses", text, (*LABELS, *names), registry=registry)
    for own, count in sorted(tally.requests.items()):
        kernels.labels(*own, *values).inc(count)
    unreadable = "Lines that the frozen nvcc did not write, or did not finish."
    counter("cachebuilder_miss_log_unreadable_lines", unreadable, tally.unreadable_lines)
    gauge("cachebuilder_last_miss_timestamp_seconds", "Unix time of the last request; 0 if there was none.", tally.last)
    gauge("cachebuilder_miss_logs", "Logs that exist; the first miss makes the log.", tally.logs)
    gauge("cachebuilder_misses_read_timestamp_seconds", "Unix time at which the logs were read.", tally.read)
    exposed: str = generate_latest(registry).decode()
    return exposed
