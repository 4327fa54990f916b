"""What can go wrong, told in one line each.

StackError   something that the reader of the message can put right
Stopped      a signal asked the owner to end; no failure
"""


class StackError(Exception):
    """The message is one line that says what is wrong and what to do; exit status 1."""


class Stopped(BaseException):
    """Raised in the main thread by a signal, past every `except Exception`."""
