"""The owner of the embedded servers: starts them, starts again what dies, ends them."""

import time
from dataclasses import dataclass, field

from project.stack import postgres, valkey
from project.stack.console import say
from project.stack.errors import StackError
from project.stack.layout import Layout
from project.stack.processes import Child, rotate

LOG_BYTES = 10_000_000
LOGS_KEPT = 3
ROTATE_EVERY_S = 60.0
# Between two tries to start a server that died.
AGAIN_S = 2.0


@dataclass
class Servers:
    """PostgreSQL and Valkey under one `.data`. A URL given runs elsewhere."""

    layout: Layout
    valkey_password: str
    database_url: str = ""
    redis_url: str = ""
    test: bool = False
    postgres: Child | None = None
    valkey: Child | None = None
    retry_at: dict[str, float] = field(default_factory=dict)
    rotate_at: float = 0.0

    def start(self) -> None:
        """Start both and wait until they answer; a URL that is given already stays as it is."""
        if not self.redis_url:
            port = valkey.choose_port(self.layout)
            self.redis_url = valkey.url(port, self.valkey_password)
            self.valkey = valkey.child(self.layout, port, self.valkey_password, test=self.test)
            self.valkey.start()
        if not self.database_url:
            self.database_url = postgres.url(self.layout)
            self.postgres = postgres.child(self.layout, test=self.test)
            self.postgres.start()
            postgres.wait_until_ready(self.postgres, self.layout)
            postgres.create_database(self.layout)
        if self.valkey:
            valkey.wait_until_ready(self.valkey, self.redis_url)

    def watch(self) -> None:
        """One look, once a second: what died is started again, and logs are kept short.

        It does not wait for the server to be ready: its clients try again themselves.
        """
        for server in (self.postgres, self.valkey):
            if server and not server.is_alive():
                self.start_again(server)
        if time.monotonic() >= self.rotate_at:
            self.rotate_at = time.monotonic() + ROTATE_EVERY_S
            for server in (self.postgres, self.valkey):
                if server:
                    rotate(server.log, LOG_BYTES, LOGS_KEPT)

    def start_again(self, server: Child) -> None:
        now = time.monotonic()
        if now >= self.retry_at.get(server.name, 0.0):
            self.retry_at[server.name] = now + AGAIN_S
            say(f"{server.name} died and is started again (see {server.log})")
            try:
                server.start()
            except OSError as error:
                say(f"{server.name} can't be started: {error}")

    def stop(self) -> None:
        for server in (self.postgres, self.valkey):
            if server:
                server.stop()


def check_external(database_url: str, redis_url: str) -> None:
    """Servers of the user's own must answer now; StackError names the variable that is wrong."""
    if database_url:
        check_postgres(database_url)
    if redis_url:
        check_redis(redis_url)


def check_postgres(address: str) -> None:
    import psycopg

    try:
        psycopg.connect(address, connect_timeout=5).close()
    except psycopg.Error as error:
        reason = " ".join(str(error).split())
        raise StackError(f"DATABASE_URL: PostgreSQL can't be reached there: {reason}") from None


def check_redis(address: str) -> None:
    import redis

    try:
        with redis.Redis.from_url(address, socket_connect_timeout=5, socket_timeout=5) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        raise StackError(f"REDIS_URL: Redis can't be reached there: {error}") from None
