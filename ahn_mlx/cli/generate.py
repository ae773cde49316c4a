"""ahn-mlx generate: a document and a question in, a streamed answer out."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from ..errors import AHNError, near_file, show
from ..reading.sampling import Sampling
from .options import (
    check_numbers,
    complete_file,
    is_given,
    json_option,
    load_model,
    loading_options,
    needs_memory,
    no_effect,
    prompt_file_option,
    quiet_option,
    sampling_of,
    sampling_options,
    template_options,
    window_bits_options,
)
from .ranks import OnRanks, pipeline_option, share
from .terminal import Answer, is_piped_in, progress_bar, say, stop_between_steps, warn_slow
from .words import files_and_question, looks_like_file, read_typed


@click.command(cls=OnRanks)
@click.argument("words", nargs=-1, metavar="[FILE]... [QUESTION]", shell_complete=complete_file)
@no_effect("verbose", when=lambda options: is_given("quiet"), why="with --quiet")
@loading_options
@prompt_file_option
@click.option("-p", "--prompt", help="The question, put after the text; - reads it from a pipe.")
@template_options
@sampling_options
@window_bits_options
@click.option("--prefill-step-size", type=int, help="Tokens read at once. [512 on CPU, else 2048]")
@click.option("--verbose", is_flag=True, help="Also print the model's settings to stderr.")
@json_option
@quiet_option
@pipeline_option
@needs_memory
def generate(words: tuple[str, ...], **options: Any) -> None:
    """Read documents of any length in constant memory, then answer.

    What names a file is read, and the other argument is the question. Text from a pipe is read
    where no file is given. Ctrl-C stops and keeps the answer so far.

    \b
    ahn-mlx generate "What is the capital of France?"
    ahn-mlx generate book.txt "How does it end?"
    cat book.txt | ahn-mlx generate "How does it end?" --max-tokens 100
    ahn-mlx generate report.md "Summarize." --model ahn-gdn-3b --temp 0.7
    ahn-mlx generate story.txt --ignore-chat-template
    ahn-mlx generate book.txt "Who dies?" --window 16384 --kv-bits 8
    ahn-mlx generate -f notes.txt -p "What is missing?" --stop "." --json
    """
    check_numbers(options)
    document, question = share(lambda: _read(words, options))
    # MLX and transformers take a second to import: after the checks.
    from ..reading.generate import Run, make_prompt
    from ..reading.template import TemplateError

    warn_slow()
    model, tokenizer = load_model(options)
    try:
        prompt = share(
            lambda: make_prompt(
                tokenizer,
                document,
                question or "",
                options["system"],
                chat_template=not options["no_chat_template"],
            )
        )
    except TemplateError as e:
        raise AHNError(f"{e}; use --ignore-chat-template") from None
    if options["verbose"]:
        say(f"{options['name']}: {model.ahn}, {len(model.layers)} layers, {len(prompt)} tokens")
    run = Run(
        model,
        tokenizer,
        prompt,
        Sampling(**sampling_of(options)),
        step=options["prefill_step_size"],
        kv_bits=int(options["kv_bits"]) if options["kv_bits"] else None,
        kv_group_size=int(options["kv_group_size"]),
    )
    if not options["as_json"]:
        sys.exit(_stream(run))
    pieces: list[str] = []
    code = _stream(run, pieces.append)
    facts = {"model": options["name"], "text": "".join(pieces), **run.facts()}
    print(json.dumps(facts), flush=True)
    sys.exit(code)


def _read(words: tuple[str, ...], options: dict[str, Any]) -> tuple[str, str | None]:
    """The text of the documents, and the question."""
    files, question = _typed(words, options)
    from_pipe = options["prompt"] == "-"  # then there is no document in it
    document = read_typed(files, question is not None) if files or not from_pipe else ""
    if not (document.strip() or question):
        raise AHNError("the prompt is empty; give a document or a question")
    return document, question


def _typed(words: tuple[str, ...], options: dict[str, Any]) -> tuple[list[str], str | None]:
    """The documents and the question that were given, in whichever way."""
    files, question = files_and_question(words)
    for file in files if question is None and not options["prompt"] else ():
        if file != "-" and not looks_like_file(file):
            say(f"note: {show(file)} is there and is read; --prompt makes it the question")
    if question and not files and not re.search(r"\s", question) and near_file(question):
        say(f"note: {show(question)} is the question{near_file(question)}")
    files += options["prompt_file"]
    if is_given("prompt"):
        if question is not None:
            raise AHNError(f"{show(question)} and --prompt: one question at a time")
        question = options["prompt"]
        if question == "-":
            if "-" in files:
                raise AHNError("standard input is the document or the question, not both")
            question = read_typed(["-"], has_prompt=True).strip("\n")
        if not question.strip():
            raise AHNError("the question is empty; give one, or leave it out")
    if files.count("-") > 1:
        raise AHNError("standard input can be read once; give one -")
    if question is None and files and "-" not in files and is_piped_in():
        say("note: what is piped in is not read; -p - makes it the question")
    return files, question


def _stream(run: Any, take: Callable[[str], None] | None = None) -> int:
    """Print the answer as it comes and then its numbers, or give it to `take`; the exit code."""
    code = 0
    answer = Answer()
    bar = progress_bar(len(run.prompt), "reading", "tokens")

    def progress(read: int, cache_bytes: int) -> None:
        bar.set_postfix_str(f"cache {cache_bytes / 1e6:.1f} MB", refresh=False)
        bar.update(read - bar.n)
        if read == len(run.prompt):
            bar.close()
        check()

    run.progress = progress
    with stop_between_steps() as check:
        try:
            for text in run:
                (take or answer.write)(text)
                check()
        except KeyboardInterrupt:
            code = 130
        finally:
            bar.close()
            answer.end()
    if not take:
        say(run.summary())
    return code
