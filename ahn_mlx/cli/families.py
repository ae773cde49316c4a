"""ahn-mlx families: which model files of mlx-lm a memory fits, and why others do not."""

import json
import sys

import click

from .command import Command
from .options import json_option


@click.command(cls=Command)
@json_option
def families(as_json: bool) -> None:
    """List the model families of this machine's mlx-lm that can have a memory, and what is
    missing in the others. Each is tried as a tiny model.

    \b
    ahn-mlx families
    ahn-mlx families --json
    """
    from importlib.metadata import version

    from tqdm import tqdm

    from ..model.families import families as names
    from ..model.families import judge

    every = tqdm(names(), desc="trying", unit=" families", disable=not sys.stderr.isatty())
    found = [judge(name) for name in every]
    if as_json:
        click.echo(json.dumps({v.family: {"fits": v.fits, "words": v.words} for v in found}))
        return
    kinds = {True: "can have a memory", False: "cannot", None: "were not tried"}
    for fits, what in kinds.items():
        chosen = [v for v in found if v.fits is fits]
        click.echo(f"{len(chosen)} of {len(found)} families of mlx-lm {version('mlx-lm')} {what}:")
        for verdict in chosen:
            click.echo(f"  {verdict.family:<18} {verdict.words}".rstrip())
