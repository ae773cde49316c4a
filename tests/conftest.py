"""Imports ahn_mlx before any test imports MLX: only then does the fast BLAS take effect."""

import ahn_mlx  # noqa: F401
