"""python -m ahn_mlx: the same as the console script ahn-mlx."""

from .cli import main

if __name__ == "__main__":
    main()
