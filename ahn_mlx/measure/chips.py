"""Apple chips: what the fastest variant of each can do at most; and the memory of this machine."""

import os
import subprocess
import sys
from pathlib import Path
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

# Of a machine's memory, for one model. Metal gives a process about so much by default, and
# elsewhere the system and other programs need the rest.
USABLE = 0.75
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def this_chip() -> str | None:
    """The key of this Mac's chip, or None elsewhere and of a chip that is not in the table."""
    if sys.platform != "darwin":
        return None
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        name = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    key = "-".join(name.lower().removeprefix("apple").split())
    return key if key in CHIPS else None


def machine_memory() -> int:
    """Bytes that this machine, or the container in which this runs, has."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(found, int(LIMIT.read_text()))
    except (OSError, ValueError):  # none, or "max"
        return found
