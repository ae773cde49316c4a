"""What the server counts, as Prometheus reads it. No label comes from a client."""

import threading
from collections import Counter

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

HELP = {
    "requests_total": "HTTP requests, by route and status",
    "answers_total": "Answers, by how they ended",
    "tokens_read_total": "Prompt tokens that were computed",
    "tokens_reused_total": "Prompt tokens that a snapshot had read before",
    "tokens_generated_total": "Tokens of answers",
    "tokens_digested_total": "Tokens of documents",
    "steps_total": "Decoding steps of all rows together",
    "first_token_seconds": "From a request to its first token",
    "token_seconds": "From one decoding step to the next",
    "rows": "Rows that there are",
    "rows_busy": "Rows that read or answer",
    "reading": "Requests and documents that wait for their next chunk",
    "kept": "Conversations and memories that wait in memory",
    "kept_bytes": "Bytes of these",
    "row_bytes": "Bytes of a full row",
    "heartbeat_seconds": "Since the engine last turned",
}


class Metrics:
    """Counters and histograms; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._times: dict[str, list[float]] = {}

    def count(self, name: str, n: float = 1, **labels: str) -> None:
        """Add n to a counter. labels: of few values each."""
        text = ",".join(f'{k}="{v}"' for k, v in labels.items())
        with self._lock:
            self._counts[name, text] += n  # type: ignore[assignment]

    def time(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        with self._lock:
            found = self._times.setdefault(name, [0.0] * (len(BUCKETS) + 2))
            for i, bound in enumerate(BUCKETS):
                found[i] += seconds <= bound
            found[-2] += 1
            found[-1] += seconds

    def value(self, name: str) -> float:
        """Of a counter, all labels together."""
        with self._lock:
            return sum(n for (known, _), n in self._counts.items() if known == name)

    def text(self, gauges: dict[str, float]) -> str:
        """All of it in Prometheus' format. gauges: values of now."""
        lines: list[str] = []
        with self._lock:
            counts, times = sorted(self._counts.items()), sorted(self._times.items())
        said = ""
        for (name, labels), n in counts:
            if name != said:
                lines += _head(name, "counter")
                said = name
            lines.append(f"ahn_{name}{{{labels}}} {n:g}" if labels else f"ahn_{name} {n:g}")
        for name, found in times:
            lines += _head(name, "histogram")
            for bound, below in zip(BUCKETS, found, strict=False):
                lines.append(f'ahn_{name}_bucket{{le="{bound:g}"}} {below:g}')
            lines.append(f'ahn_{name}_bucket{{le="+Inf"}} {found[-2]:g}')
            lines += [f"ahn_{name}_sum {found[-1]:.6g}", f"ahn_{name}_count {found[-2]:g}"]
        for name, value in gauges.items():
            lines += [*_head(name, "gauge"), f"ahn_{name} {value:.10g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> list[str]:
    return [f"# HELP ahn_{name} {HELP[name]}", f"# TYPE ahn_{name} {kind}"]
