"""ahn-mlx eval: what its commands are."""

import click

from .command import Group
from .harness import lm_eval
from .suites import infinitebench, longbench, lveval, score
from .synthetic import SYNTHETIC, recall


@click.group("eval", cls=Group)
def evaluate() -> None:
    """Ask a model what suites ask, and score the answers as the paper does.

    \b
    ahn-mlx eval recall --model ahn-gdn-smollm2-135m
    ahn-mlx eval longbench --model ahn-gdn-3b --limit 10 --out longbench-3b
    ahn-mlx eval score longbench-3b
    """


for command in (recall, *SYNTHETIC, longbench, infinitebench, lveval, score, lm_eval):
    evaluate.add_command(command)
