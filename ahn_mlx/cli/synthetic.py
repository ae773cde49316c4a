"""ahn-mlx eval recall, passkey, niah, vt, babi: tasks made here, on a text of the user's or
ours, asked of memory, window alone and full attention."""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from ..outputs.pictures import OutFile, new_figure, picture, save_picture
from ..reading.text import read_documents
from .estimate import print_table
from .options import (
    check_numbers,
    force_option,
    json_option,
    load_model,
    loading_options,
    needs_memory,
    no_effect,
    quiet_option,
    text_option,
)
from .ranks import OnRanks, is_first, pipeline_option, share
from .suites import agree
from .terminal import progress_bar, warn_slow

TEXT = Path(__file__).parent.parent / "demo" / "pride-and-prejudice.txt"
NIAH = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            no_effect("force", when=lambda options: not options["plot"], why="without --out"),
            loading_options,
            text_option(help="Whose sentences hide the facts. Default: a novel of ours."),
            click.option("--seed", default=0, show_default=True, help="Of the items."),
            pipeline_option,
            json_option,
            click.option(
                "-o", "--out", "plot", type=click.Path(path_type=Path), help="Write a picture too."
            ),
            force_option,
            quiet_option,
            needs_memory,
        )
    ):
        command = option(command)
    return command


def _begin(options: dict[str, Any], lows: dict[str, int]) -> tuple[OutFile | None, list[str]]:
    """The picture's file, and sentences."""
    check_numbers(options)
    for name, low in lows.items():
        if options[name] < low:
            raise AHNError(f"--{name} must be at least {low}, not {options[name]}")
    out = None
    if options["plot"] and is_first():
        reads = (Path(options["text"] or TEXT), Path(options["name"]))
        out = picture(options["plot"], reads, options["force"])
    from ..evaluate.generators import sentences_of

    text = share(lambda: read_documents([options["text"] or str(TEXT)], has_prompt=False))
    found = sentences_of(text)
    if not found:
        raise AHNError(f"{options['text']}: has no sentences of 20 to 400 characters")
    warn_slow()
    return out, found


@click.command(cls=OnRanks)
@click.option("--documents", default=14, show_default=True, help="Read by each mixer.")
@click.option("--needles", default=8, show_default=True, help="Facts in each.")
@click.option("--tokens", default=915, show_default=True, help="Of each document.")
@_common
def recall(**options: Any) -> None:
    """Measure what a memory keeps of facts that left the window, in nats.

    Unless --window and --sinks say otherwise, with a window of 256 tokens and 32 sinks, so that
    most facts leave it soon.

    \b
    ahn-mlx eval recall
    ahn-mlx eval recall --model ahn-dn-smollm2-135m -o recall.png
    ahn-mlx eval recall --text book.txt --documents 50 --json
    """
    out, sentences = _begin(options, {"documents": 1, "needles": 2, "tokens": 1})
    short = {"window": 256, "sinks": 32}
    options |= {k: v for k, v in short.items() if options[k] is None}
    model, tokenizer = load_model(options)
    from ..evaluate.recall import make_documents, measure

    shape = {k: options[k] for k in ("documents", "needles", "tokens", "seed")}
    documents = make_documents(tokenizer, sentences, **shape)
    tokens = 3 * sum(len(d.ids) for d in documents)
    with progress_bar(tokens, "reading", "tokens") as bar:
        found = measure(model, tokenizer, documents, bar.update)
    if options["as_json"]:
        click.echo(json.dumps(found.facts(), indent=2))
    else:
        _print_recall(found)
    if out:
        _plot_recall(found, model.ahn.window, out)


def _print_recall(found: Any) -> None:
    from ..evaluate.mixers import MIXERS
    from ..evaluate.recall import MEASURES, PLACES

    rows = []
    for place in filter(found.count, PLACES):
        for mixer in MIXERS:
            means = [found.mean(mixer, measure, place) for measure in MEASURES]
            numbers = [*(f"{x:.3f}" for x in means[:3]), *(f"{x:.1%}" for x in means[3:])]
            rows.append([place, f"{found.count(place)}", mixer, *numbers])
    head = ["facts", "number", "mixer", "NLL", "margin, bound", "margin, seen"]
    print_table([*head, "first, bound", "first, seen"], rows)
    if not found.count("beyond"):
        click.echo("no fact is beyond the window; give more --tokens or a smaller --window")
        return
    for name, said in (("nll", "NLL"), ("seen", "seen"), ("bound", "bound")):
        share, error = found.share(name)
        about = f" +- {error:.1%}" if isfinite(error) else ", of one document"
        click.echo(f"share of {said} that the memory keeps: {share:.1%}{about}")


def _plot_recall(found: Any, window: int, out: OutFile) -> None:
    from ..evaluate.mixers import MIXERS
    from ..evaluate.recall import MEASURES

    curves = {
        mixer: found.table[i, ..., MEASURES.index("nll")].mean(axis=0)
        for i, mixer in enumerate(MIXERS)
    }
    _plot(found.distances.mean(axis=0), curves, window, "NLL of the value (nats)", out)


def _plot(x: Any, curves: dict[str, Any], window: int, label: str, out: OutFile) -> None:
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(x, values, marker="o", label=name)
    axes.axvline(window, color="grey", linestyle=":", label="end of the window")
    axes.set(xlabel="tokens since the fact", ylabel=label)
    axes.legend()
    save_picture(figure, out, 120)


def _ask(tasks: tuple[str, ...], options: dict[str, Any]) -> None:
    out, sentences = _begin(options, {"length": 1, "items": 1})
    model, tokenizer = load_model(options)
    from ..evaluate.mixers import MIXERS
    from ..evaluate.run import Cost, reading_speed
    from ..evaluate.synthetic import DEPTHS, ask, summarize

    settings = {"length": options["length"], "count": options["items"], "seed": options["seed"]}
    total = len(tasks) * len(DEPTHS) * options["items"] * len(MIXERS)
    tokens = total * options["length"]
    agree(Cost(total, tokens, tokens / reading_speed(model)), "questions")
    with progress_bar(total, "asking", "questions") as bar:
        answered = list(ask(model, tokenizer, tasks, sentences, progress=bar.update, **settings))
    found = summarize(answered)
    if options["as_json"]:
        facts = {
            "mixers": MIXERS,
            "summary": [x._asdict() for x in found],
            "items": [x._asdict() for x in answered],
        }
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        rows = []
        for s in found:
            pairs = zip(s.means, s.errors, strict=True)
            scores = [f"{100 * m:.1f} +- {100 * e:.1f}" for m, e in pairs]
            gain = f"{100 * s.gain:+.1f} +- {100 * s.gain_error:.1f}"
            rows.append([s.task, s.place, f"{s.n}", *scores, gain])
        print_table(["task", "facts", "items", *MIXERS, "memory - window"], rows)
    if out:
        _plot_scores(answered, model.ahn.window, out)


def _plot_scores(answered: list[Any], window: int, out: OutFile) -> None:
    from ..evaluate.mixers import MIXERS

    depths = sorted({a.depth for a in answered}, reverse=True)
    groups = [[a for a in answered if a.depth == depth] for depth in depths]

    def mean(values: Any) -> float:
        values = list(values)
        return sum(values) / len(values)

    curves = {
        mixer: [100 * mean(a.scores[i] for a in group) for group in groups]
        for i, mixer in enumerate(MIXERS)
    }
    _plot([mean(a.distance for a in group) for group in groups], curves, window, "score", out)


def _made(name: str, tasks: tuple[str, ...], about: str, *more: str) -> click.Command:
    def command(**options: Any) -> None:
        chosen = tasks
        if wanted := options.get("tasks"):
            chosen = tuple(word.strip() for word in wanted.split(","))
            if wrong := set(chosen) - set(NIAH):
                raise AHNError(f"--tasks: no task {min(wrong)}; there are {', '.join(NIAH)}")
        _ask(chosen, options)

    examples = "\n".join(f"ahn-mlx eval {name} {words}".rstrip() for words in ("", *more))
    command.__doc__ = f"{about}\n\n\b\n{examples}\n"
    decorated: Any = command
    if name == "niah":
        decorated = click.option("--tasks", help=f"Of {', '.join(NIAH)}, with commas.")(decorated)
    decorated = click.option(
        "--items", default=4, show_default=True, help="At each of five depths."
    )(_common(decorated))
    decorated = click.option(
        "--length", default=2048, show_default=True, help="Tokens of prompt and answer."
    )(decorated)
    made: click.Command = click.command(name, cls=OnRanks)(decorated)
    return made


SYNTHETIC = (
    _made(
        "passkey",
        ("passkey",),
        "Ask for a number that is hidden in a text.",
        "--length 4096 --items 20",
    ),
    _made(
        "niah",
        NIAH[:1],
        "Ask for numbers that are hidden under names.",
        "--tasks niah_multikey,niah_multiquery -o niah.png",
    ),
    _made(
        "vt",
        ("vt",),
        "Ask which variables have a value, through others.",
        "--model ahn-dn-smollm2-135m",
    ),
    _made(
        "babi1",
        ("babi1",),
        "Ask where a person is, of facts that change.",
        "--text book.txt --json",
    ),
    _made(
        "babi2",
        ("babi2",),
        "Ask where a thing is that persons carry about.",
        "--window 512 --sinks 32",
    ),
    _made("babi3", ("babi3",), "Ask where a thing was before.", "--length 8192 -o babi3.png"),
)
