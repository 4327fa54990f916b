"""A worker that does nothing: takes hints from the queues and ends their tasks, many at a time.

    python -m tests.benchmarks.consumer QUEUE…

It stands in for hundreds of worker slots, so that the dispatcher is what is measured. Each hint's
row goes `queued → succeeded` in one UPDATE for all that one look found.
"""

import json
import os
import signal
import sys
import time

import psycopg
import redis

TAKEN = 1000
PAUSE_S = 0.02

END = """
UPDATE llmtasks_task SET status = 'succeeded', finished_at = clock_timestamp()
WHERE id = ANY(%s::uuid[]) AND status = 'queued'
"""


def task_id(message: bytes) -> str:
    """A hint's Celery id is `<task id>.<seq>`."""
    return str(json.loads(message)["headers"]["id"]).partition(".")[0]


def take(broker: "redis.Redis", names: list[str]) -> list[bytes]:
    with broker.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.rpop(name, TAKEN)
        return [message for found in pipe.execute() for message in found or ()]


def main(names: list[str]) -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    with (
        redis.Redis.from_url(os.environ["REDIS_URL"]) as broker,
        psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as database,
    ):
        while not stopped:
            if hints := take(broker, names):
                database.execute(END, [[task_id(hint) for hint in hints]])
            else:
                time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1:])
