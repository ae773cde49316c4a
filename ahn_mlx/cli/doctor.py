"""ahn-mlx doctor: one line per fact, then what is missing and how to get it."""

import json

import click

from .command import Command
from .options import json_option


@click.command(cls=Command)
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has and lacks: device, also NVIDIA's, MLX, how float32 is
    multiplied, BLAS and its speed, compiler, and of every Metal kernel whether it compiles, its
    error and its time.

    \b
    ahn-mlx doctor
    ahn-mlx doctor --json
    """
    from ..measure.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps({f.name: {"value": f.value, "mend": f.mend} for f in findings}))
        return
    for finding in findings:
        click.echo(f"{finding.name:<26} {finding.value}")
    missing = [finding for finding in findings if finding.mend]
    for finding in missing:
        click.echo(f"to mend {finding.name}: {finding.mend}")
    if not missing:
        optional = ", ".join(finding.name for finding in findings if finding.optional)
        absent = f"; optional, and not there: {optional}" if optional else ""
        click.echo(f"everything needed is there{absent}")
