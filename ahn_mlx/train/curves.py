"""A picture of a training: its loss, and what it was worth on the sequences held out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AHNError, note
from ..outputs.files import OutFile
from ..outputs.pictures import new_figure, save_picture
from .metrics import METRICS, read_metrics
from .validation import VALIDATION, read_validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
KL = "KL from full attention\n(nats per token)"
UNITS = {"kl": KL, "ce": "cross-entropy\n(nats per token)", "distill": "distance of the heads"}

Lines = list[dict[str, Any]]


def write_curves(out: Path, loss: str) -> None:
    """CURVES of the files in `out`, if they have a line. loss: one of losses.NAMES.

    Training goes on if it cannot be drawn, which is said. Raises AHNError if a file is damaged.
    """
    losses, held = read_metrics(out / METRICS), read_validation(out / VALIDATION)
    if not losses:
        return
    try:
        figure = new_figure(7, 4 if loss == "kl" or not held else 7)
        draw(figure, losses, held, loss, out.resolve().name)
        save_picture(figure, OutFile(out / CURVES, "of a training", lambda file: True), 120)
    except AHNError as e:
        note(str(e))


def draw(figure: "Figure", losses: Lines, held: Lines, loss: str, name: str) -> None:
    """One plot if the loss is the KL that is measured on what was held out, otherwise two."""
    apart = bool(held) and loss != "kl"
    plots: Any = figure.subplots(1 + apart, 1, squeeze=False, sharex=True)[:, 0]
    _losses(plots[0], losses, UNITS[loss])
    if held:
        _held_out(plots[-1], held)
    if not apart and held:
        plots[0].set_title(f"{name}: the lower, the nearer to full attention")
    else:
        plots[0].set_title(f"{name}: loss of the training")
    if apart:
        plots[-1].set_title("what was held out: the lower, the nearer to full attention")
    for axes in plots:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    plots[-1].set_xlabel("step")


def _losses(axes: "Axes", lines: Lines, unit: str) -> None:
    losses: list[float] = [line["loss"] for line in lines]
    means: list[float] = []
    for loss in losses:
        means.append(loss if not means else 0.9 * means[-1] + 0.1 * loss)
    steps = [line["step"] for line in lines]
    axes.plot(steps, losses, marker=".", alpha=0.3, color="C0", label="each step, on its own text")
    axes.plot(steps, means, color="C0", label="running mean")
    axes.set_ylabel(unit)


def _held_out(axes: "Axes", lines: Lines) -> None:
    """With the memory by step, and the window alone, which training does not change."""
    steps, kl = [line["step"] for line in lines], [line["kl"] for line in lines]
    alone = lines[-1]["window_kl"]
    axes.plot(steps, kl, marker="o", color="C1", label=f"held out, with memory: {kl[-1]:.4f}")
    axes.axhline(alone, color="C7", ls="--", label=f"held out, window alone: {alone:.4f}")
    axes.set_ylabel(KL)
    axes.set_ylim(bottom=0)
