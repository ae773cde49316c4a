"""What the drawing functions put into their axes."""

import json
import math
import struct

import pytest
from matplotlib.figure import Figure

from ahn_mlx import AHNError
from ahn_mlx.cli.compare import draw_buckets, draw_stream
from ahn_mlx.measure.compare import Bucket, Comparison, Stretch
from ahn_mlx.outputs.pictures import check_drawing
from ahn_mlx.train import curves


def bucket(first: int, end: int, window: float, memory: float, error: float) -> Bucket:
    kl = {"window": window, "memory": memory}
    errors = {"nll": 0.1, "kl": error, "gap": 0.01}
    nll = {"full": 3.0, "window": 3.2, "memory": 3.1}
    return Bucket(first, end, end - first, nll, kl, errors)


def texts(axes) -> list[str]:
    return [t.get_text() for t in axes.texts]


def test_bars_of_compare():
    parts = [bucket(96, 128, 0.2, 0.1, 0.01), bucket(128, 256, 0.4, 0.42, 0.05)]
    figure = Figure()
    draw_buckets(figure, Comparison(parts, bucket(96, 256, 0.3, 0.27, 0.02), [0.9]), "m on book")
    (axes,) = figure.axes
    heights = [round(bar.get_height(), 6) for bar in axes.patches]
    assert heights == [0.2, 0.4, 0.3, 0.1, 0.42, 0.27]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["96\nto 128", "128\nto 256", "all"]
    assert texts(axes) == ["0.50", "1.05\nnoise", "0.90\nnoise"]
    assert "m on book" in axes.get_title() and "nats per token" in axes.get_ylabel()
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 0.42 + 2 * 0.05
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert labels[0] == "window alone" and labels[1].startswith("with memory, ± 2")
    ends = axes.containers[1].lines[2][0].get_segments()
    assert [round(y, 6) for _, y in ends[0]] == [0.08, 0.12]


def test_bars_of_a_stream_are_above_0_where_the_memory_helps():
    stretches = [
        Stretch(8192 * n, 8192 * (n + 1), {"window": 3.0, "memory": 2.9 + 0.2 * (n % 2)}, 0.01)
        for n in range(20)
    ]
    figure = Figure()
    draw_stream(figure, stretches, "m on book")
    (axes,) = figure.axes
    assert [round(bar.get_height(), 6) for bar in axes.patches[:2]] == [0.1, -0.1]
    assert len(axes.patches) == 20
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert len(labels) <= 8 and labels[1] == "24,576\nto 32,768"


LOSSES = [{"step": n, "loss": 1 / (n + 1)} for n in range(5)]
HELD = [
    {"step": n, "kl": 0.3 - n / 100, "window_kl": alone}
    for n, alone in ((0, 0.35), (3, 0.38), (5, 0.4))
]


def test_curves_of_a_training_on_kl():
    figure = Figure()
    curves.draw(figure, LOSSES, HELD, "kl", "mine")
    (axes,) = figure.axes
    steps, mean, held, alone = axes.lines
    assert list(steps.get_xdata()) == [0, 1, 2, 3, 4]
    assert list(steps.get_ydata()) == [line["loss"] for line in LOSSES]
    assert mean.get_ydata()[1] == pytest.approx(0.9 * 1 + 0.1 * 0.5)
    assert list(held.get_xdata()) == [0, 3, 5] and held.get_ydata()[2] == pytest.approx(0.25)
    assert set(alone.get_ydata()) == {0.4}
    assert axes.get_xlabel() == "step" and "nats per token" in axes.get_ylabel()
    assert "mine" in axes.get_title() and axes.get_ylim()[0] == 0
    assert axes.get_title() == "mine: the lower, the nearer to full attention"
    assert all(x == round(x) for x in axes.get_xticks())
    assert all(line.get_visible() and line.get_alpha() == 0.3 for line in axes.get_xgridlines())
    # What a step has lost is faint beside the mean; what was held out is of another colour.
    assert (steps.get_color(), steps.get_alpha(), steps.get_marker()) == ("C0", 0.3, ".")
    assert (mean.get_color(), held.get_color(), alone.get_color()) == ("C0", "C1", "C7")
    assert (held.get_marker(), alone.get_linestyle()) == ("o", "--")
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert labels[:2] == ["each step, on its own text", "running mean"]
    assert labels[2:] == ["held out, with memory: 0.2500", "held out, window alone: 0.4000"]


@pytest.mark.parametrize("loss", ["ce", "distill"])
def test_another_loss_has_axes_of_its_own(loss):
    figure = Figure()
    curves.draw(figure, LOSSES, HELD, loss, "mine")
    above, below = figure.axes
    assert (len(above.lines), len(below.lines)) == (2, 2)
    assert above.get_ylabel() == curves.UNITS[loss] and below.get_xlabel() == "step"
    assert below.get_ylabel() == "KL from full attention\n(nats per token)"
    assert above.get_title() == "mine: loss of the training"
    assert below.get_title() == "what was held out: the lower, the nearer to full attention"
    assert above.get_shared_x_axes().joined(above, below)
    assert all(axes.get_legend() is not None for axes in (above, below))


def test_nothing_held_out():
    figure = Figure()
    curves.draw(figure, LOSSES, [], "ce", "mine")
    (axes,) = figure.axes
    assert len(axes.lines) == 2
    figure = Figure()
    curves.draw(figure, LOSSES, [], "kl", "mine")
    assert figure.axes[0].get_title() == "mine: loss of the training"
    # Between two steps there is none.
    figure = Figure()
    curves.draw(figure, LOSSES[:2], HELD[:1], "ce", "mine")
    assert all(x == round(x) for axes in figure.axes for x in axes.get_xticks())


@pytest.mark.parametrize(
    ("loss", "held", "size"),
    [("kl", HELD, (840, 480)), ("ce", HELD, (840, 840)), ("ce", [], (840, 480))],
)
def test_a_second_plot_has_room_of_its_own(loss, held, size, tmp_path):
    for name, lines in (("metrics.jsonl", LOSSES), ("validation.jsonl", held)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # drawn anew at each save
        curves.write_curves(tmp_path, loss)
        assert struct.unpack(">II", (tmp_path / "curves.png").read_bytes()[16:24]) == size
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "curves.png").unlink()
    curves.write_curves(tmp_path, loss)
    assert not (tmp_path / "curves.png").exists()


def test_verdicts():
    assert bucket(0, 9, 0.2, 0.1, 0.04).verdict == "helps"
    assert bucket(0, 9, 0.1, 0.2, 0.04).verdict == "harms"
    assert bucket(0, 9, 0.2, 0.1, 0.06).verdict == "noise"
    assert bucket(0, 1, 0.2, 0.1, math.nan).verdict == "noise"


def test_what_cannot_be_drawn_is_known_before(monkeypatch):
    import matplotlib

    check_drawing("a.png")
    with matplotlib.rc_context({"text.usetex": True}), pytest.raises(AHNError, match=r"a\.png"):
        monkeypatch.setenv("PATH", "")  # needs LaTeX
        check_drawing("a.png")
