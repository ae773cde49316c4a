"""ahn-mlx train: a memory for a model, from texts."""

import math
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AHNError
from ..hub.published import DEFAULT
from ..model.config import AHNConfig
from ..outputs.parts import working_on
from ..platform import enough_memory
from .command import Several, Word
from .options import complete_file, complete_model, is_given, no_effect, quiet_option
from .terminal import progress_bar, say, stop_between_steps

if TYPE_CHECKING:
    from ..train.settings import Settings

KINDS = ("gated_deltanet", "deltanet", "mamba2")


MOST = 1 << 31  # of any whole number: steps, sequences, tokens


@click.command(cls=Several)
@click.argument("data", cls=Word, needed=True, nargs=-1, metavar="DATA...")
@no_effect(
    *("memory", "layerwise"),
    when=lambda options: options["ahn"],
    why="with --ahn: {ahn} has its kind of memory, and is not fitted again",
)
@no_effect(
    *("lr", "warmup", "weight_decay", "loss", "accumulate", "grad_checkpoint", "save_every"),
    *("random_window", "batch_size"),
    when=lambda options: options["steps"] == 0,
    why="with --steps 0, which trains no step",
)
@no_effect("steps", when=lambda options: options["minutes"], why="with --minutes; give one")
@click.option(
    "--model",
    "base",
    default=DEFAULT,
    show_default=True,
    shell_complete=complete_model,
    help="Model to give a memory, or with one.",
)
@click.option(
    "--kind",
    "memory",
    type=click.Choice(KINDS),
    default=KINDS[0],
    show_default=True,
    help="Of memory.",
)
@click.option("--router", is_flag=True, help="Let it grow louder with what it has compressed.")
@click.option("--window-gain", is_flag=True, help="A router that also learns a gain by window.")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE|FOLDER|GLOB",
    shell_complete=complete_file,
    help="Text or JSONL. Repeatable.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory of the checkpoint.",
)
@click.option(
    "--window",
    "windows",
    multiple=True,
    default=("1024",),
    show_default=True,
    metavar="TOKENS[+SINKS][@SEQUENCE]",
    help="Tokens kept losslessly; also with sinks and a length of its own, as 1024+64@4096."
    " Repeatable: each step draws one.",
)
@click.option("--sinks", default=64, show_default=True, help="First tokens kept for ever.")
@click.option(
    "--sink-positions",
    type=click.Choice(["absolute", "clamped"]),
    default="clamped",
    show_default=True,
    help="How far away sinks are seen.",
)
@click.option("--random-window", is_flag=True, help="Draw both as the paper does.")
@click.option("--seq-len", default=4096, show_default=True, help="Tokens of a sequence.")
@click.option(
    "--layerwise",
    default=16,
    show_default=True,
    metavar="N",
    help="First fit each layer to N sequences; 0: start as the paper's release, from zero.",
)
@click.option(
    "--ahn",
    type=click.Path(path_type=Path),
    help="Start from this trained memory, without a layer-wise fit.",
)
@click.option("--steps", default=500, show_default=True, help="Of end-to-end training; 0: none.")
@click.option("--minutes", type=float, help="Of end-to-end training, instead of --steps.")
@click.option("--lr", default=1e-4, show_default=True, help="Learning rate of the gates.")
@click.option("--warmup", default=10, show_default=True, help="Steps to reach it.")
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option("--loss", type=click.Choice(["kl", "ce", "distill"]), default="kl", show_default=True)
@click.option("--batch-size", default=1, show_default=True, help="Sequences at once.")
@click.option("--accumulate", default=1, show_default=True, help="Batches per step.")
@click.option("--grad-checkpoint", is_flag=True, help="Less memory, a third more time.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the base.")
@click.option("--save-every", default=20, show_default=True, help="Steps between saves.")
@click.option("--seed", default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on where --out stopped, with its settings.")
@quiet_option
@enough_memory("take a smaller --batch-size or --seq-len, --grad-checkpoint or a smaller model")
def train(**options: Any) -> None:
    """Train a memory: the model learns to see through it what its window has lost.

    The model itself stays as it is. OUT gets a checkpoint of the memory alone, in the layout
    of the PyTorch release, which `ahn-mlx generate --ahn OUT` takes; what was measured, and
    curves.png; and the state that --resume goes on from. Ctrl-C saves all of them.

    \b
    ahn-mlx train books/*.txt -o my-memory
    ahn-mlx train books/*.txt -o my-memory --resume --steps 1000
    ahn-mlx train texts.jsonl --model Qwen/Qwen2.5-3B-Instruct --kind deltanet \\
      --seq-len 8192 --grad-checkpoint -o ahn-dn-3b-mine
    ahn-mlx train books/*.txt -o all --seq-len 2048 --batch-size 8 --minutes 30 \\
      --window 256+32 --window 256+32 --window 1024+64@4096
    ahn-mlx train more.txt --ahn my-memory -o better    # further, on other texts
    mlx.launch -n 2 ahn-mlx train ...    # several machines or processes
    """
    out: Path = options["out"]
    from ..hub import bases
    from ..model.ranks import join, share
    from ..train import loop, output
    from ..train.data import Sequences

    typed = options.pop("windows")
    if options["resume"]:
        _as_before(options)
    if is_given("windows") or not options["resume"]:
        _take_windows(options, typed)
    options["minutes"] = options["minutes"] or 0.0
    _check(options)
    output.check_out(out, options)
    if options["ahn"]:
        _take_memory(options, options["ahn"])
        if not is_given("base"):
            options["base"] = bases.base_of(options["ahn"])
    options["router"] = options["router"] or options["window_gain"]
    drawable = _can_draw(out)
    base = output.load_base(options)
    if options["ahn"]:
        bases.put_memory(base, options["ahn"])
        options["layerwise"] = 0
    settings = _settings(options)
    data = Sequences(options["data"], base.tokenizer, settings.seq_len, settings.seed)
    trainer = loop.Trainer(base.model, data, settings, out if options["resume"] else None)
    if trainer.explained is not None:
        say(f"layer-wise: the memory explains {trainer.explained:.1%} of what the window misses")
    with ExitStack() as held:
        # What rank 0 refuses ends the others too.
        share(join(), lambda: _take_place(held, options))
        run = _Run(trainer, base, options, drawable)
        try:
            run.to_the_end()
        except KeyboardInterrupt:
            run.save(measured=False)
            say(f"stopped after {trainer.schedule.said()}; --resume goes on")
            sys.exit(130)
    if run.main:
        _say_what_next(out, run.validation.summary())


def _take_place(held: ExitStack, options: dict[str, Any]) -> None:
    """Make the directory, and be the only training that writes it for as long as `held`."""
    from ..train import output

    out: Path = options["out"]
    output.check_out(out, options)  # again, an hour may have passed
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(working_on(out))
    output.check_out(out, options)  # another may just have ended
    output.clear(out)


class _Run:
    """Steps of a trainer, and what is written of them, by one of several machines."""

    def __init__(self, trainer: Any, base: Any, options: dict[str, Any], drawable: bool):
        from ..train.metrics import METRICS, Metrics
        from ..train.validation import VALIDATION, Validation

        self.trainer, self.base, self.options, self.drawable = trainer, base, options, drawable
        self.main, out = trainer.world.rank() == 0, options["out"]
        if self.main:
            self.metrics = Metrics(out / METRICS, trainer.step)
            texts = trainer.texts[trainer.settings.seq_len]
            self.validation = Validation(
                out / VALIDATION, base.model, texts, trainer.settings, trainer.step
            )

    def to_the_end(self) -> None:
        """Raises KeyboardInterrupt between two steps."""
        from ..train.settings import batch_of, draw_window

        trainer, settings = self.trainer, self.trainer.settings
        timed = settings.minutes > 0
        whole = round(60 * settings.minutes) if timed else settings.steps
        unit = "seconds" if timed else "steps"
        with (
            stop_between_steps() as check,
            progress_bar(whole, "training", unit, self._done(timed)) as bar,
        ):
            # Of one that goes on, again: killed in a save, it may not have measured that step.
            if trainer.step % self.options["save_every"] == 0:
                self.save()
            while not trainer.schedule.done:
                drawn = draw_window(settings, trainer.step)
                step, loss, speed = trainer.step, trainer.train_step(), 0.0
                tokens = batch_of(settings, drawn) * drawn.seq_len * settings.accumulate
                if self.main:
                    speed = self.metrics.write(step, loss, tokens * trainer.world.size(), drawn)
                about = {"loss": f"{loss:.4f}", "tokens_per_s": f"{speed:.0f}"}
                bar.set_postfix(about, refresh=False)  # a log has few lines
                bar.update(self._done(timed) - bar.n)
                if trainer.step % self.options["save_every"] == 0:
                    self.save()
                check()
            self.save()

    def _done(self, timed: bool) -> int:
        """Of the seconds, or the steps."""
        return int(self.trainer.schedule.agreed) if timed else int(self.trainer.step)

    def save(self, measured: bool = True) -> None:
        """measured: also on what was held out, which takes as long as a step."""
        from ..train import curves, output

        if not self.main:
            return
        out: Path = self.options["out"]
        output.write_checkpoint(out, self.base, self.options, self.trainer.save)
        if measured:
            self.validation.measure(self.trainer.step)
        if self.drawable:
            curves.write_curves(out, self.options["loss"])


def _as_before(options: dict[str, Any]) -> None:
    """What was not typed is as it was in the run that goes on."""
    from ..hub.bases import base_of
    from ..train import loop

    out = options["out"]
    before, _ = loop.read_settings(out)
    if is_given("steps"):
        before["minutes"] = 0.0
    if not options["ahn"]:
        _take_memory(options, out)
    if not is_given("base"):
        before["base"] = base_of(out)
    options |= {k: v for k, v in before.items() if not is_given(k)}


def _take_windows(options: dict[str, Any], typed: tuple[str, ...]) -> None:
    """The first is that of the memory; all are what a step draws from. Raises AHNError for another
    spelling, and for what each of them says itself."""
    from ..train.settings import Window

    own = [Window.spelled(text, -1, -1) for text in typed]
    for name in ("sinks", "seq_len"):
        if is_given(name) and all(getattr(window, name) >= 0 for window in own):
            option = f"--{name.replace('_', '-')}"
            raise AHNError(f"{option} has no effect where each --window says its own; leave it out")
    found = [Window.spelled(text, options["sinks"], options["seq_len"]) for text in typed]
    options |= found[0]._asdict()
    options["windows"] = " ".join(map(str, found)) if len(found) > 1 else ""


def _take_memory(options: dict[str, Any], directory: Path) -> None:
    """The settings of a trained memory that are not to be chosen again."""
    from ..checkpoints.baseconfig import read_config  # imports MLX

    config = AHNConfig.from_dict(read_config(directory))
    found = {"memory": config.memory, "sink_positions": config.sink_positions}
    options |= {k: v for k, v in found.items() if not is_given(k)}
    options["query_projection"] = config.query_projection
    options["router"] = options["router"] or config.router
    options["window_gain"] = options["window_gain"] or config.window_gain


def _can_draw(out: Path) -> bool:
    from ..outputs.pictures import check_drawing
    from ..train.curves import CURVES

    try:
        check_drawing(str(out / CURVES))
    except AHNError as e:
        say(f"note: {e}; training goes on without")
        return False
    return True


def _say_what_next(out: Path, measured: str) -> None:
    name = shlex.quote(str(out))
    say(f"wrote {out}")
    if measured:
        say(measured)
    say("use it, and measure it on a text that it has not seen:")
    say(f"  ahn-mlx generate FILE QUESTION --ahn {name}")
    say(f"  ahn-mlx compare FILE --ahn {name} -o compare.png")


def _check(options: dict[str, Any]) -> None:
    from ..train.settings import choices

    lows = {"window": 1, "sinks": 0, "seq_len": 2, "layerwise": 0, "steps": 0, "warmup": 0}
    lows |= {"accumulate": 1, "batch_size": 1, "save_every": 1, "seed": 0}
    for name, low in lows.items():
        if options[name] < low:
            raise AHNError(
                f"--{name.replace('_', '-')} must be at least {low}, not {options[name]}"
            )
        if options[name] > MOST:  # a saved state's too
            raise AHNError(f"--{name.replace('_', '-')} must be at most {MOST:,}")
    if not 0 < options["lr"] < math.inf:
        raise AHNError(f"--lr must be above 0 and finite, not {options['lr']}")
    if not 0 <= options["weight_decay"] < math.inf:
        found = options["weight_decay"]
        raise AHNError(f"--weight-decay must be at least 0 and finite, not {found}")
    if is_given("minutes") and not 0 < options["minutes"] < math.inf:
        raise AHNError(f"--minutes must be above 0, not {options['minutes']:g}")
    several = len(choices(_settings(options))) > 1
    if several and options["steps"] == 0 and not options["minutes"]:
        raise AHNError("with --steps 0, which trains no step, one --window has an effect; give one")


def _settings(options: dict[str, Any]) -> "Settings":
    from ..train.settings import Settings

    names = Settings.__dataclass_fields__
    return Settings(**{k: v for k, v in options.items() if k in names})
