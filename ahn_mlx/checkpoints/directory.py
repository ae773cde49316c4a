"""A checkpoint directory that may come from anyone: which files make it up, what they
hold. Whatever is wrong with it is an AHNError of one line, raised before MLX opens a file,
and what is left out is said."""

import codecs
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import AHNError, is_utf8, note, show
from .safetensors import TensorInfo, is_finite, read_header

INDEX = "model.safetensors.index.json"
UNUSED = "unused.safetensors"  # of the memory, no use to the model; kept for the way back
OURS = (UNUSED, "training.safetensors")  # which nobody takes for weights of the model
MAX_JSON = 64 << 20  # bytes of an index or a vocabulary
MAX_SETTINGS = 4 << 20  # of config.json and the like
TABLES = (".index.json", "tokenizer.json", "vocab.json")
MAX_DEPTH = 64  # of lists and objects in each other

# What files of weights are called before their numbers, the likeliest first: of transformers,
# of Mistral, of older MLX, and of pickles that became safetensors.
STEMS = ("model", "consolidated", "weights", "pytorch_model")
# Files of weights by the looks of their name. Optimizers and the like end in .bin too.
WEIGHTS = re.compile(r".+\.safetensors|.+\.gguf|pytorch_model.*\.bin|consolidated.*\.pth")


class Source(NamedTuple):
    """Where a tensor is and what its file's header says about it."""

    name: str
    file: Path
    info: TensorInfo


@contextmanager
def unreplaced(*paths: Path) -> Iterator[Callable[[], None]]:
    """Raise AHNError if one of these is deleted, or another put in its place, while it is read:
    what was read is of two models then, or of none. Yields what looks before the end."""
    with ExitStack() as opened:
        before = [(path, _open(path, opened)) for path in paths]

        def check() -> None:
            for path, was in before:
                if was is not None and not _is(path, was):
                    raise AHNError(f"{path}: deleted or replaced while it was read; try again")

        try:
            yield check
        except Exception as e:
            check()
            if isinstance(e, FileNotFoundError) and _lies_in(e.filename, paths):
                raise AHNError(f"{e.filename}: deleted while it was read; try again") from None
            raise
        check()


def _lies_in(name: Any, paths: Iterable[Path]) -> bool:
    return isinstance(name, str | Path) and any(Path(name).is_relative_to(p) for p in paths)


def _open(path: Path, opened: ExitStack) -> int | None:
    """Its descriptor, as nothing else gets the number of an inode that is open; None if it cannot
    be opened, which whoever reads it says."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # of a pipe too
    except (OSError, ValueError):
        return None
    opened.callback(os.close, descriptor)
    return descriptor


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    check_member(file)
    most = MAX_JSON if file.name.endswith(TABLES) else MAX_SETTINGS
    if file.stat().st_size > most:
        raise AHNError(f"{file}: larger than {most >> 20} MB; this is no such file")
    try:
        value = json.loads(file.read_bytes())
        check_depth(value)
    except (ValueError, RecursionError) as e:
        raise AHNError(f"{file}: not valid JSON ({show(str(e))}); fetch it again") from None
    if not isinstance(value, dict):
        raise AHNError(f"{file}: must hold an object, not {show(value)}")
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError if lists and objects are in each other more than MAX_DEPTH deep: what was
    read could not be written again, or shown."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        depth += 1
        holders = [x for x in level if isinstance(x, dict | list)]
        level = [x for h in holders for x in (h.values() if isinstance(h, dict) else h)]


def check_member(file: Path) -> None:
    """A regular file, and no link that leads out of its directory. The cache of
    huggingface-hub, where snapshots/<revision>/* link to blobs/*, is one directory."""
    real, root = Path(os.path.realpath(file)), Path(os.path.realpath(file.parent))
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(r) for r in roots):
        raise AHNError(f"{file}: a link out of its directory; put the file itself there")
    if not real.is_file():
        what = "not a regular file" if real.exists() else "missing"
        raise AHNError(f"{file}: {what}; fetch it again")


@dataclass(frozen=True)
class Files:
    """One checkpoint. weight_map: tensor -> name of its file, as an index has it, or empty."""

    paths: list[Path]
    index: Path | None = None
    weight_map: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return (self.index or self.paths[0]).name


def find_files(path: Path, suffix: str = "safetensors", stems: Iterable[str] = STEMS) -> Files:
    """The files of a checkpoint: those that its index names, or one file, or numbered shards;
    none if there is nothing of the kind. Raises AHNError if a shard is missing."""
    for stem in stems:
        index = path / f"{stem}.{suffix}.index.json"
        if os.path.lexists(index):
            weight_map = _weight_map(index, suffix)
            return Files(sorted({path / n for n in weight_map.values()}), index, weight_map)
        if os.path.lexists(path / f"{stem}.{suffix}"):
            return Files([path / f"{stem}.{suffix}"])
        if shards := _numbered_shards(path, stem, suffix):
            return Files(shards)
    return Files([])


def _weight_map(index: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file name, from an index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AHNError(f"{index}: weight_map must map tensor names to files; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(rf"[\w.-]+\.{suffix}", file):
            raise AHNError(
                f"{index}: tensor {show(name)} is in {show(file)}, "
                f"which is not the name of a {suffix} file beside it"
            )
    return weight_map


def _numbered_shards(path: Path, stem: str, suffix: str) -> list[Path]:
    """model-00001-of-00002.safetensors and its siblings, or weights.00.safetensors and on."""
    found: dict[int, dict[int, Path]] = {}  # how many there are -> number -> file
    for file in path.iterdir() if path.is_dir() else ():
        number = rf"{stem}(?:\.{suffix})?-(\d{{1,6}})-of-(\d{{1,6}})\.{suffix}"
        if m := re.fullmatch(number, file.name):
            found.setdefault(int(m[2]), {})[int(m[1])] = file
        elif m := re.fullmatch(rf"{stem}\.(\d{{1,6}})\.{suffix}", file.name):
            found.setdefault(0, {})[int(m[1]) + 1] = file
    if len(found) > 1:
        first, second = (min(shards.values()).name for shards in list(found.values())[:2])
        raise AHNError(f"{path}: {first} and {second} are of two checkpoints; remove one")
    for total, shards in found.items():
        numbers = range(1, (total or max(shards)) + 1)
        for i in numbers:
            if i not in shards:
                count = f" of {total}" if total else ""
                raise AHNError(f"{path}: shard {i}{count} is missing; fetch it again")
        return [shards[i] for i in numbers]
    return []


def read_headers(path: Path) -> dict[str, Source]:
    """Every tensor of a directory, from the headers of its safetensors alone."""
    files = find_files(path)
    if not files.paths:
        others = _other_weights(path, files)
        has = f"; it has {show(others[0])}, see ahn-mlx convert --help" if others else ""
        raise AHNError(f"{path}: no model.safetensors{has}; save the checkpoint as safetensors")
    return gather(path, files, _file_sources)


def gather(
    path: Path, files: Files, header: Callable[[Path], Iterable[Source]]
) -> dict[str, Source]:
    """Every tensor of a checkpoint. The index decides which shard holds it; what is left out
    and what the index does not know is said on stderr."""
    sources: dict[str, Source] = {}
    doubles: list[Source] = []
    for source in (s for file in files.paths for s in header(file)):
        if files.weight_map.get(source.name, source.file.name) != source.file.name:
            doubles.append(source)
        elif other := sources.get(source.name):
            raise AHNError(
                f"{source.file}: tensor {show(source.name)} is in {other.file.name} too; "
                "remove one file"
            )
        else:
            sources[source.name] = source
    for name, file in files.weight_map.items():
        if name not in sources:
            raise AHNError(
                f"{path / file}: tensor {show(name)} is missing, "
                "though the index lists it; fetch it again"
            )
    if doubles:
        name, file = doubles[0].name, doubles[0].file.name
        more = _more(len(doubles))
        note(f"{files.index}: does not want {show(name)} of {file}{more}; it is left out")
    if unlisted := sorted(set(sources) - set(files.weight_map)) if files.index else []:
        more = _more(len(unlisted))
        note(f"{files.index}: does not list {show(unlisted[0])}{more}; it is read all the same")
    if others := _other_weights(path, files):
        note(f"{path}: read from {files.name}; {show(others[0])}{_more(len(others))} is left out")
    return sources


def _other_weights(path: Path, files: Files) -> list[str]:
    """The names of what looks like weights and belongs to another checkpoint."""
    known = {*OURS, *(file.name for file in files.paths)}
    return sorted(
        f.name for f in path.iterdir() if f.name not in known and WEIGHTS.fullmatch(f.name)
    )


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def read_unused(path: Path) -> dict[str, Source]:
    """What an earlier conversion has set aside."""
    if not os.path.lexists(path / UNUSED):
        return {}
    return {source.name: source for source in _file_sources(path / UNUSED)}


def _file_sources(file: Path) -> list[Source]:
    check_member(file)
    return [Source(name, file, info) for name, info in read_header(file).items()]


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a directory, validated, and not read until they are used."""
    sources = read_headers(path)
    files = {file: load_safetensors(file) for file in {s.file for s in sources.values()}}
    return {name: files[source.file][name] for name, source in sources.items()}


def load_safetensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a file whose header has been judged, lazily."""
    if not is_utf8(file):
        raise AHNError(f"{file}: its path is not UTF-8, which MLX does not open; rename it")
    try:
        return mx.load(str(file), format="safetensors")  # type: ignore[return-value]
    except (RuntimeError, ValueError) as e:
        raise AHNError(f"{file}: MLX cannot load it ({show(str(e))})") from None


def copy_files(names: Iterable[str], inputs: list[Path], directory: Path) -> None:
    """Copy each file from the first input that has it. JSON loses its BOM, which neither
    mlx_lm nor transformers reads."""
    for name in names:
        for path in inputs:
            if os.path.lexists(path / name):
                check_member(path / name)
                if has_bom(path / name):
                    data = (path / name).read_bytes()
                    (directory / name).write_bytes(data.removeprefix(codecs.BOM_UTF8))
                else:
                    shutil.copyfile(path / name, directory / name)
                break


def has_bom(file: Path) -> bool:
    """Whether a JSON file starts with the byte order mark of UTF-8."""
    if file.suffix != ".json" or not file.is_file():
        return False
    with file.open("rb") as f:
        return f.read(3) == codecs.BOM_UTF8


def check_finite(name: str, x: mx.array) -> None:
    """Raise AHNError if a float tensor holds NaN or infinity."""
    if not is_finite(x):
        raise AHNError(f"tensor {show(name)} holds NaN or infinity; fetch the checkpoint again")
