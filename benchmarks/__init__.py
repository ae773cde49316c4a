"""Measurements behind the README's figures; none of them is a test."""

import ahn_mlx  # noqa: F401 - before MLX, for the fast BLAS
