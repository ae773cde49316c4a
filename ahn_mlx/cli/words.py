"""What is typed without an option, told apart: files that are there, and a question.

Whoever has a file and a question types them one after the other. What is there is a file, and
what looks like a file but is not there is a mistake, never a question.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import AHNError, near_file, show
from ..reading.text import read_documents, typed_path
from .terminal import progress_bar

# Endings that a question does not have by itself.
ENDINGS = "ahn|csv|docx?|epub|html?|json|jsonl|log|md|odt|pdf|rst|rtf|tex|txt|xml"
_ENDS = re.compile(rf"\.({ENDINGS})$", re.IGNORECASE)
_PATH = re.compile(r"^~|[/\\*]|\.\w{1,5}$")


def is_there(word: str) -> bool:
    """Whether it names a file or directory, or a pattern that some have; - is standard input."""
    path = typed_path(word)
    return word == "-" or (bool(word) and (os.path.lexists(path) or _is_glob(path)))


def _is_glob(path: str) -> bool:
    return "*" in path and next(glob.iglob(path, recursive=True), None) is not None


def looks_like_file(word: str) -> bool:
    """Whether someone who types this means a file, whether or not it is there."""
    if word.rstrip().endswith("?"):
        return False
    return bool(_ENDS.search(word) or (not re.search(r"\s", word) and _PATH.search(word)))


def files_and_question(
    words: Sequence[str], mend: str = "if it is the question, give it with --prompt"
) -> tuple[list[str], str | None]:
    """The files among some words, in their order, and the question, if there is one.

    mend: what to do about a file that is not there. Raises AHNError then, and for more than
    one question.
    """
    files = [w for w in words if is_there(w)]
    others = [w for w in words if not is_there(w)]
    for missing in filter(looks_like_file, others):
        raise AHNError(f"{show(missing)}: no such file{near_file(missing) or f'; {mend}'}")
    if len(others) > 1:
        single = [w for w in others if w.strip() and not re.search(r"\s", w)]
        for missing in single:
            # One of them is a file, by another name or beside a question of several words.
            near = near_file(missing)
            if near or len(single) < len(others):
                raise AHNError(f"{show(missing)}: no such file{near or f'; {mend}'}")
        if single:
            raise AHNError(f'a question of several words goes in quotes: "{" ".join(others)}"')
        raise AHNError(f"{show(others[0])} and {show(others[1])}: one question at a time")
    if others and not others[0].strip():
        raise AHNError("the question is empty; give one, or leave it out")
    return files, others[0] if others else None


def memory_and_question(words: Sequence[str]) -> tuple[Path | None, str | None]:
    """The memory file and the question among some words, in whichever order.

    Raises AHNError as files_and_question does, and for more than one file.
    """
    files, question = files_and_question(words, "ahn-mlx digest writes one")
    if len(files) > 1:
        raise AHNError(f"{show(files[0])} and {show(files[1])}: one memory file at a time")
    if not files and question and (near := near_file(question, ".ahn")):
        raise AHNError(f"{show(question)}: no such file{near}")
    return (Path(typed_path(files[0])) if files else None), question


def read_typed(files: Sequence[str], has_prompt: bool, memory: str = "ahn-mlx ask reads it") -> str:
    """The text of documents, as read_documents has it, with a bar for those of many pages.

    memory: what to do about a memory file, which is no document; may name {file}. Raises
    AHNError, also for the home directory and those that it is in: nobody means all of them.
    """
    home = Path("/", os.path.expanduser("~")).resolve()
    for file in files:
        path = Path(typed_path(file))
        if path.suffix.lower() == ".ahn" and path.is_file():
            raise AHNError(f"{file}: is a memory, not a document; {memory.format(file=file)}")
        if file != "-" and path.is_dir() and home.is_relative_to(path.resolve()):
            raise AHNError(f"{file}: is too much to read; give a folder in it, or files")
    with progress_bar(0, "opening", "pages") as bar:

        def progress(read: int, total: int) -> None:
            bar.total = total
            bar.update(read - bar.n)

        return read_documents(files, has_prompt, progress)


def memory_name(files: Sequence[str]) -> Path:
    """The file that keeps what is left of one document, in the working directory.

    Raises AHNError if there is not one document with a name.
    """
    names = [f for f in files if f != "-" and not _is_glob(f)]
    if len(files) != 1 or not names or not (stem := Path(os.path.abspath(names[0])).stem):
        raise AHNError("no name for the memory; give one with -o, as in -o book.ahn")
    return Path(f"{stem}.ahn")
