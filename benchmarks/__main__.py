"""python -m benchmarks NAME: tables and plots, each a comparison within one run.

python -m benchmarks recurrence
python -m benchmarks decode --plots docs/plots
"""

import click

from .conversion import conversion
from .decode import decode
from .embed import embed
from .far import far
from .first_hour import first_hour
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
    conversion,
    decode,
    embed,
    far,
    first_hour,
    memory,
    metal,
    prefill,
    quantized,
    recurrence,
    serve,
    training,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
