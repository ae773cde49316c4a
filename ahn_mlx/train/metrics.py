"""What a run says of each step: a line of JSON with its loss, window and speed."""

import json
import math
import time
from pathlib import Path
from typing import Any

from ..errors import AHNError
from ..outputs.files import replacing
from .settings import Window

METRICS = "metrics.jsonl"


class Metrics:
    """A line of JSON per step. Of an earlier run, the steps before `step` are kept."""

    def __init__(self, file: Path, step: int):
        self.file = file
        if file.is_file():
            lines = [line for line in read_metrics(file) if line["step"] < step]
            with replacing(file) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.last = time.perf_counter()

    def write(self, step: int, loss: float, tokens: int, drawn: Window) -> float:
        """Returns tokens per second of this step."""
        now = time.perf_counter()
        speed, self.last = tokens / (now - self.last), now
        line = {"step": step, "loss": loss, "window": drawn.window, "sinks": drawn.sinks}
        try:
            with self.file.open("a") as out:
                out.write(json.dumps({**line, "tokens_per_second": round(speed, 1)}) + "\n")
        except OSError as e:
            raise AHNError(f"{self.file}: cannot be written ({e.strerror}); --resume") from None
        return speed


def read_metrics(file: Path, number: str = "loss") -> list[dict[str, Any]]:
    """The lines of a metrics file; a last one that was cut short is left out.

    Raises AHNError for any other line that does not say a step and this number.
    """
    lines = []
    found = file.read_bytes().split(b"\n") if file.is_file() else []
    for n, line in enumerate(found, 1):
        try:
            lines.append(_metric(json.loads(line), number))
        except (ValueError, RecursionError):
            if n < len(found):
                raise AHNError(
                    f"{file}: line {n} says no step and {number}; mend it, or move the file away"
                ) from None
    return lines


def _metric(line: Any, number: str) -> Any:
    """The line, if it says a step and this number."""
    step, value = (line.get("step"), line.get(number)) if isinstance(line, dict) else (None, None)
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise ValueError
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError
    return line
