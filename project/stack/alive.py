"""`python -m project.stack.alive`: the health check of a container that serves no port.

Exit status 0 if a process of this host holds a lease, which it renews every few seconds.
"""

import os
import socket

import psycopg

QUERY = "SELECT 1 FROM llmtasks_worker WHERE host = %s AND lease_until > clock_timestamp() LIMIT 1"


def is_alive(database_url: str, host: str) -> bool:
    with psycopg.connect(database_url, connect_timeout=3) as connection:
        return connection.execute(QUERY, [host]).fetchone() is not None


if __name__ == "__main__":
    raise SystemExit(not is_alive(os.environ["DATABASE_URL"], socket.gethostname()))
