"""ahn-mlx generate: a document and a question in, a streamed answer out."""

import os
import sys
from typing import Any

import click

from ..errors import AHNError
from ..reading.text import read_documents
from .options import (
    check_numbers,
    load_model,
    loading_options,
    needs_memory,
    sampling_options,
    template_options,
    window_bits_options,
)
from .terminal import progress_bar, say, warn_slow

# transformers warns about absent frameworks and long inputs, which are normal here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@click.command()
@loading_options
@click.option("--prompt-file", metavar="FILE", help="Text to read; - is standard input.")
@click.option("--prompt", default="", help="Question, put after the text.")
@template_options
@sampling_options
@window_bits_options
@click.option("--prefill-step-size", type=int, help="Tokens read at once. [512 on CPU, else 2048]")
@click.option("--verbose", is_flag=True, help="Also print the model's settings to stderr.")
@needs_memory
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
    check_numbers(options)
    files = [options["prompt_file"]] if options["prompt_file"] else []
    document = read_documents(files, bool(options["prompt"]))
    if not (document.strip() or options["prompt"].strip()):
        raise AHNError("the prompt is empty; give a text to read or --prompt")
    # MLX and transformers take a second to import: after the checks.
    from ..reading.generate import Run, make_prompt
    from ..reading.template import TemplateError

    warn_slow()
    model, tokenizer = load_model(options)
    try:
        prompt = make_prompt(
            tokenizer,
            document,
            options["prompt"],
            options["system"],
            chat_template=not options["no_chat_template"],
        )
    except TemplateError as e:
        raise AHNError(f"{e}; use --no-chat-template") from None
    if options["verbose"]:
        say(f"{options['name']}: {model.ahn}, {len(model.layers)} layers, {len(prompt)} tokens")
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
    bar = progress_bar(len(run.prompt), "reading", "tokens")

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
    say(run.summary())
    return code
