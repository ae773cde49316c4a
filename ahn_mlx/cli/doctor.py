"""ahn-mlx doctor: one line per fact, then what is missing and how to get it."""

import click


@click.command()
def doctor() -> None:
    """Say what this machine has and lacks: device, MLX, BLAS and its speed, compiler, and
    of every Metal kernel whether it compiles, its error and its time.

    \b
    ahn-mlx doctor
    """
    from ..measure.doctor import examine

    findings = examine()
    for finding in findings:
        click.echo(f"{finding.name:<26} {finding.value}")
    missing = [finding for finding in findings if finding.mend]
    for finding in missing:
        click.echo(f"to mend {finding.name}: {finding.mend}")
    if not missing:
        click.echo("nothing is missing")
