"""What a training is worth on sequences that it does not see, measured at each save."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AHNError
from ..model.augment import head
from ..outputs.files import replacing
from .data import Sequences
from .losses import divergence, rows_at_once
from .metrics import read_metrics
from .settings import Settings
from .streams import silenced, study, teach

VALIDATION = "validation.jsonl"


class Validation:
    """Divergence (KL) from full attention of the sequences held out, in nats per token beyond
    window and sinks: with the memory, and of the window alone.

    A line of JSON for each step that was measured: "step" is how many were made. Of an earlier
    run, those up to `step` are kept.
    """

    def __init__(
        self, file: Path, model: nn.Module, data: Sequences, settings: Settings, step: int
    ):
        self.file, self.model = file, model
        self.window, self.sinks = settings.window, settings.sinks
        fits = settings.seq_len > settings.window + settings.sinks  # of random windows, perhaps
        self.tokens = [mx.array(row)[None] for row in data.held_out] if fits else []
        self.lines = [line for line in read_validation(file) if line["step"] <= step]
        if file.is_file():
            with replacing(file) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.full: list[mx.array] = []
        self.window_kl = 0.0

    def measure(self, step: int) -> None:
        """Unless that step has been, or nothing was held out."""
        if not self.tokens or (self.lines and self.lines[-1]["step"] == step):
            return
        if not self.full:
            self.full = [teach(self.model, tokens).hidden for tokens in self.tokens]
            mx.eval(self.full)
            with silenced(self.model):
                self.window_kl = self._kl()
        self.lines.append({"step": step, "kl": self._kl(), "window_kl": self.window_kl})
        try:
            with self.file.open("a") as out:
                out.write(json.dumps(self.lines[-1]) + "\n")
        except OSError as e:
            raise AHNError(f"{self.file}: cannot be written ({e.strerror}); --resume") from None

    def summary(self) -> str:
        """The last line in words, or "" without one."""
        if not self.lines:
            return ""
        last = self.lines[-1]
        ratio = last["kl"] / last["window_kl"] if last["window_kl"] else 1.0
        return (
            f"held out: KL {last['kl']:.4f} with the memory, {last['window_kl']:.4f} of the window"
            f" alone (ratio {ratio:.3f})"
        )

    def _kl(self) -> float:
        total, count, W = 0.0, 0, self.window + self.sinks
        for tokens, full in zip(self.tokens, self.full, strict=True):
            hidden = study(self.model, tokens, self.window, self.sinks, inference=True).hidden
            rows = rows_at_once(head(self.model, hidden[0, :1]).shape[-1])
            for a in range(W, tokens.shape[1], rows):
                logits = [head(self.model, x[0, a : a + rows]) for x in (full, hidden)]
                total += float(divergence(*logits).sum().item())  # type: ignore[arg-type]
            count += tokens.shape[1] - W
        return total / count


def read_validation(file: Path) -> list[dict[str, Any]]:
    """The lines of such a file. Raises AHNError for one that does not say its numbers."""
    read_metrics(file, "window_kl")
    return read_metrics(file, "kl")
