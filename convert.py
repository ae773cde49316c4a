"""python convert.py --base DIR --ahn DIR --out DIR: the same as `ahn-mlx convert`."""

from ahn_mlx.convert import main

if __name__ == "__main__":
    main()
