"""python convert.py AHN --base BASE -o DIR: the same as `ahn-mlx convert`."""

import sys

from ahn_mlx.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
