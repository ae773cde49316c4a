"""ahn-mlx generate: a document and a question in, a streamed answer out."""

import os
import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ..errors import AHNError
from ..platform import BLAS, BLAS_COMMANDS, default_dtype

# transformers warns about absent frameworks and long inputs, which are normal here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DEFAULT = "ahn-gdn-smollm2-135m"


@click.command()
@click.option(
    "--model", "name", default=DEFAULT, show_default=True, help="Name, ORG/NAME or directory."
)
@click.option("--prompt-file", metavar="FILE", help="Text to read; - is standard input.")
@click.option("--prompt", default="", help="Question, put after the text.")
@click.option("--system", default="", help="System message. Default: the chat template's.")
@click.option("--max-tokens", default=256, show_default=True, help="Longest answer.")
@click.option("--temp", default=0.0, show_default=True, help="Temperature; 0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--window", type=int, help="Tokens kept losslessly. Default: the model's.")
@click.option("--sinks", type=int, help="First tokens kept for ever. Default: the model's.")
@click.option("--kv-bits", type=click.Choice(["8", "4"]), help="Quantize sinks and window.")
@click.option(
    "--kv-group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Numbers that share a scale.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Default: float32 on the CPU, else as stored.",
)
@click.option(
    "--q-bits", type=click.Choice(["0", "4", "8"]), help="Base of a published name. [default: 4]"
)
@click.option("--prefill-step-size", type=int, help="Tokens read at once. [512 on CPU, else 2048]")
@click.option("--no-chat-template", is_flag=True, help="Continue the text as it is.")
@click.option("--verbose", is_flag=True, help="Also print the model's settings to stderr.")
def generate(**options: Any) -> None:
    """Read a document of any length in constant memory, then answer.

    Text from a pipe is read without --prompt-file. Ctrl-C stops and keeps the answer so far.

    \b
    ahn-mlx generate --prompt "What is the capital of France?"
    ahn-mlx generate --prompt-file book.txt --prompt "How does it end?"
    cat book.txt | ahn-mlx generate --prompt "How does it end?" --max-tokens 100
    ahn-mlx generate --model ahn-gdn-3b --prompt-file report.md --prompt "Summarize." --temp 0.7
    ahn-mlx generate --prompt-file story.txt --no-chat-template
    ahn-mlx generate --prompt-file book.txt --prompt "Who dies?" --window 16384 --kv-bits 8
    """
    _check(options)
    document = _read_document(options["prompt_file"], bool(options["prompt"]))
    if not (document.strip() or options["prompt"].strip()):
        raise AHNError("the prompt is empty; give a text to read or --prompt")
    # MLX and transformers take a second to import: after the checks.
    from .. import zoo
    from ..generate import Run, make_prompt

    _warn_slow()
    model, tokenizer = zoo.load(
        options["name"],
        window=options["window"],
        sinks=options["sinks"],
        dtype=options["dtype"],
        q_bits=None if options["q_bits"] is None else int(options["q_bits"]),
    )
    prompt = make_prompt(
        tokenizer,
        document,
        options["prompt"],
        options["system"],
        chat_template=not options["no_chat_template"],
    )
    if options["verbose"]:
        _say(f"{options['name']}: {model.ahn}, {len(model.layers)} layers, {len(prompt)} tokens")
    run = Run(
        model,
        tokenizer,
        prompt,
        max_tokens=options["max_tokens"],
        temp=options["temp"],
        top_p=options["top_p"],
        seed=options["seed"],
        step=options["prefill_step_size"],
        kv_bits=int(options["kv_bits"]) if options["kv_bits"] else None,
        kv_group_size=int(options["kv_group_size"]),
    )
    sys.exit(_stream(run))


def _stream(run: Any) -> int:
    """Print the answer as it comes; the exit code."""
    code = 0
    last = ""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    bar = tqdm(
        total=len(run.prompt),
        desc="reading",
        unit=" tokens",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
        dynamic_ncols=True,
    )

    def progress(read: int, cache_bytes: int) -> None:
        bar.set_postfix_str(f"cache {cache_bytes / 1e6:.1f} MB", refresh=False)
        bar.update(read - bar.n)
        if read == len(run.prompt):
            bar.close()

    run.progress = progress
    try:
        for text in run:
            print(text, end="", flush=True)
            last = text or last
    except KeyboardInterrupt:
        code = 130
    finally:
        bar.close()
    if last and not last.endswith("\n"):
        print(flush=True)
    _say(run.summary())
    return code


def _check(options: dict[str, Any]) -> None:
    for name, low in (("max_tokens", 1), ("window", 1), ("sinks", 0), ("prefill_step_size", 1)):
        value = options[name]
        if value is not None and value < low:
            raise AHNError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    if not options["temp"] >= 0:
        raise AHNError(f"--temp must be at least 0, not {options['temp']}")
    if not 0 < options["top_p"] <= 1:
        raise AHNError(f"--top-p must be above 0 and at most 1, not {options['top_p']}")
    seed = options["seed"]
    if seed is not None and not 0 <= seed < 2**64:
        raise AHNError(f"--seed must be from 0 to 2**64 - 1, not {seed}")


def _read_document(file: str | None, has_prompt: bool) -> str:
    """The text to read; without a file, what is piped in."""
    if file is None:
        if sys.stdin is None or sys.stdin.isatty():
            if not has_prompt:
                raise AHNError("nothing to read; give --prompt-file, --prompt or pipe in a text")
            return ""
        file = "-"
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as e:
        raise AHNError(f"{name}: {e.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise AHNError(
            f"{name}: not UTF-8 text (byte {e.start:,}); convert it: iconv -f latin1 -t utf-8"
        ) from None
    return text.replace("\r\n", "\n")


def _warn_slow() -> None:
    if not BLAS.fast and default_dtype() is not None:
        _say(f"note: reading will be slow ({BLAS.name}); {' or '.join(BLAS_COMMANDS)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
