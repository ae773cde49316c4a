"""How much memory a process holds at most. What the system tells of a whole process, ru_maxrss,
begins with what its parent held: a program that a large one starts has it as its own."""

import resource
import sys
from pathlib import Path

STATUS, SINCE = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# Before a command: a process of its own between the two, which is small.
FROM_A_SMALL_ONE = ("sh", "-c", '"$@"; exit $?', "sh")


def start_over() -> None:
    """What is held now is the most so far, where the system has that."""
    if SINCE.exists():
        SINCE.write_text("5")


def most() -> int:
    """Bytes."""
    if STATUS.exists():
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
