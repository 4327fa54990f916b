"""Lines for the person at the terminal."""

import os
import sys
import termios


def say(line: str = "") -> None:
    """Write one line. A terminal that was closed, or a pipe that nobody reads, is no reason
    to leave processes behind."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")


class Terminal:
    """The terminal that we were started from, if any."""

    def __init__(self) -> None:
        self.was_there = sys.stdin is not None and sys.stdin.isatty()

    def is_gone(self) -> bool:
        """Whether it was closed. Its SIGHUP goes to whoever leads the session, which may be a
        make that keeps it to itself."""
        if not self.was_there:
            return False
        try:
            termios.tcgetattr(0)
        except termios.error:
            return True
        return False
