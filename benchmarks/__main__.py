"""python -m benchmarks NAME: tables and plots, each a comparison within one run.

python -m benchmarks recurrence
python -m benchmarks decode --plots docs/plots
"""

import click

from .conversion import conversion
from .decode import decode
from .far import far
from .memory import memory
from .metal import metal
from .prefill import prefill
from .quantized import quantized
from .recurrence import recurrence
from .serve import serve
from .training import training


@click.group(help=__doc__)
def main() -> None:
    pass


for command in (
    *(conversion, decode, far, memory, metal, prefill, quantized, recurrence, serve, training),
):
    main.add_command(command)

if __name__ == "__main__":
    main()
