"""Lines for the person at the terminal."""

import os
import sys


def say(line: str = "") -> None:
    """Write one line. A terminal that was closed, or a pipe that nobody reads, is no reason
    to leave processes behind."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")
