"""Builds this model in stock mlx_lm: mlx_lm.load(..., trust_remote_code=True).

A copy lies in each converted directory, where config.json names it as model_file. It
needs the package ahn-mlx.
"""

import mlx.nn as nn

from ahn_mlx.model import ModelArgs, build


def Model(args: ModelArgs) -> nn.Module:
    """What mlx_lm calls with ModelArgs.from_dict(config)."""
    return build(args.config)
