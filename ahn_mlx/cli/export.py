"""ahn-mlx export-pytorch, upload: a converted model on its way out."""

from pathlib import Path

import click

from .command import Command, Word
from .options import plain_model_option, quiet_option


@click.command("export-pytorch", cls=Command)
@click.argument("name", cls=Word, needed=True, metavar="MODEL")
@plain_model_option
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@click.option(
    "--layout",
    type=click.Choice(["ahn-only", "merged"]),
    default="merged",
    show_default=True,
    help="The memory's parameters alone, or with the base's.",
)
@click.option("--force", is_flag=True, help="Replace a model that is at --out.")
@quiet_option
def export_pytorch(name: str, out: Path, layout: str, force: bool) -> None:
    """Write a model back in a layout of the PyTorch release, in safetensors.

    \b
    ahn-mlx export-pytorch ./trained --layout ahn-only -o AHN-GDN-mine
    ahn-mlx export-pytorch ./trained -o merged
    """
    from ..checkpoints.export import export_pytorch
    from ..hub.download import find

    export_pytorch(find(name), out, layout, force)
    click.echo(f"wrote {out}")


@click.command(cls=Command)
@click.argument("name", cls=Word, needed=True, metavar="MODEL")
@plain_model_option
@click.option("--repo", required=True, metavar="ORG/NAME", help="Repository; made if need be.")
@click.option("--private", is_flag=True, help="If it has to be made.")
@quiet_option
def upload(name: str, repo: str, private: bool) -> None:
    """Put a converted model, with a model card, on the hub. Needs a token: `hf auth login`.

    \b
    ahn-mlx upload ./ahn-gdn-3b --repo my-org/ahn-gdn-3b-4bit
    """
    from ..hub.download import find, upload

    click.echo(upload(find(name), repo, private))
