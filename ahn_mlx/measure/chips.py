"""Apple chips: what the fastest variant of each can do at most."""

from typing import NamedTuple


class Chip(NamedTuple):
    """bandwidth: GB/s of unified memory. cores: of the GPU. tflops: float32 peak of the GPU,
    None where Apple has not published one."""

    bandwidth: float
    cores: int
    tflops: float | None


# Apple's announcements of each chip and its technical specifications of the Macs.
CHIPS = {
    "m1": Chip(68.25, 8, 2.6),
    "m1-pro": Chip(200, 16, 5.2),
    "m1-max": Chip(400, 32, 10.4),
    "m1-ultra": Chip(800, 64, 21),
    "m2": Chip(100, 10, 3.6),
    "m2-pro": Chip(200, 19, None),
    "m2-max": Chip(400, 38, None),
    "m2-ultra": Chip(800, 76, None),
    "m3": Chip(100, 10, None),
    "m3-pro": Chip(150, 18, None),
    "m3-max": Chip(400, 40, None),
    "m3-ultra": Chip(819, 80, None),
    "m4": Chip(120, 10, None),
    "m4-pro": Chip(273, 20, None),
    "m4-max": Chip(546, 40, None),
    "m5": Chip(153, 10, None),
    "m5-pro": Chip(307, 20, None),
    "m5-max": Chip(614, 40, None),
}
