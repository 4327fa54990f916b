"""Which TCP ports are free on loopback."""

import errno
import secrets
import socket

from project.stack.errors import StackError


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now. Connections that linger from one that just
    ended do not count, as they don't for the server."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise StackError(f"can't listen on {host}:{port}: {error.strerror}") from None
    return True


def free_port(first: int, attempts: int = 1000) -> int:
    """A free port of those from `first` on, which should lie below those that the kernel lends
    for outgoing connections, so that it is still free the next day.

    Begins anywhere among them: two that look at the same time rarely find the same.
    """
    begin = secrets.randbelow(attempts)
    for offset in range(attempts):
        port = first + (begin + offset) % attempts
        if is_free(port):
            return port
    raise StackError(f"no free port between {first} and {first + attempts}")


def require_free(ports: dict[str, int], host: str = "127.0.0.1") -> None:
    """`ports` by the variable that sets each; StackError names the first that is taken."""
    for variable, port in ports.items():
        if not is_free(port, host):
            raise StackError(
                f"port {port} is taken: give another one, e.g. `make up {variable}={port + 10}`"
            )
