"""ahn-mlx convert: a checkpoint of the PyTorch release in, an MLX directory out."""

from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from .command import Command, Word
from .options import quiet_option


@click.command(cls=Command)
@click.argument("ahn", cls=Word, needed=True, metavar="AHN")
@click.option("--base", help="Base model: a directory, a GGUF file, ORG/NAME or a name of ours.")
@click.option(
    "--ahn",
    type=click.Path(path_type=Path),
    help="AHN parameters of the PyTorch release, or a merged checkpoint (then without --base).",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of all parameters but the decays, which stay float32. Default: as they are.",
)
@click.option(
    "--q-bits",
    type=click.Choice(["0", "4", "8"]),
    default="0",
    help="Quantize the base; the memory never is. Default: 0, as it is.",
)
@click.option("--yarn", type=float, metavar="FACTOR", help="Stretch the base's positions by YaRN.")
@click.option("--force", is_flag=True, help="Replace a model that is at --out.")
@quiet_option
def convert(base: str | None, q_bits: str, **options: Any) -> None:
    """Convert a checkpoint of the PyTorch release of AHN to MLX.

    AHN holds the parameters of the memory, and --base the model that they are for.

    \b
    ahn-mlx convert AHN-GDN-for-Qwen-2.5-Instruct-3B \\
      --base Qwen2.5-3B-Instruct -o ahn-gdn-3b
    ahn-mlx convert my-memory --base Qwen/Qwen2.5-3B-Instruct -o my-model
    ahn-mlx convert merged -o ahn-gdn-3b --dtype bfloat16    # base included
    """
    from ..checkpoints.convert import convert
    from ..hub.bases import find_base

    path = find_base(base) if base else None
    try:
        convert(path, q_bits=int(q_bits), **options)
    except AHNError as e:
        # Who named a repository or a model of ours has never seen where its files are.
        raise AHNError(str(e).replace(f"{path}:", f"{base}:") if base else str(e)) from None
    click.echo(f"wrote {options['out']}")
