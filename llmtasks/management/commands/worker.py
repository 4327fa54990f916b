"""`manage.py worker --lane LANE`: a Celery worker that serves one lane of every provider."""

import logging
import signal
import socket
import threading
import time
from typing import Any

from celery import current_app, signals
from celery.worker import state
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import OperationalError
from kombu.utils.limits import TokenBucket

from llmtasks import checks, memory, pulse, queues, routing, stores, tasks
from llmtasks.models import Lane, Worker

log = logging.getLogger(__name__)

# How often a worker looks whether its pulse saw a new configuration.
LOOK_S = 0.1
# How long the consumer may take for it before it is asked again: Redis may be away.
AGAIN_S = 2.0
# Celery asks Redis for a message for a second at a time. What came with the last question is
# taken, and given back; a consumer closed at once would lose it.
LAST_MESSAGE_S = 1.2
MAINTENANCE = "maintenance"


class Command(BaseCommand):
    help = "Run queued work of one lane. New providers are taken up while it runs."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--lane", choices=queues.lanes(), required=True)
        parser.add_argument(
            "--concurrency", type=int, default=settings.LLMTASKS["WORKER_CONCURRENCY"]
        )
        parser.add_argument("--loglevel", default="WARNING")

    def handle(self, **options: Any) -> None:
        if wrong := checks.redis_version():
            raise CommandError(wrong)
        lane, slots = options["lane"], options["concurrency"]
        pulse.start(Worker.Role.WORKER, lane, slots)
        follower = Follower(lane)
        signals.worker_ready.connect(follower.start, weak=False)
        signals.worker_shutting_down.connect(follower.stop, weak=False)
        try:
            current_app.worker_main(
                [
                    "worker", "--pool=threads", f"--concurrency={slots}",
                    f"--queues={','.join(follower.base)}",
                    f"--hostname={lane}@{socket.gethostname()}",
                    f"--loglevel={options['loglevel']}",
                    "--without-gossip", "--without-mingle", "--task-events",
                ]
            )  # fmt: skip
        finally:
            pulse.stop()


class Follower:
    """Gives the worker a queue and a Celery task for each provider, as configuration changes."""

    def __init__(self, lane: str) -> None:
        self.lane = lane
        # Celery needs a queue to start with: periodic work goes with the least urgent lane.
        self.base = [MAINTENANCE if lane == Lane.BULK else f"{lane}.idle"]
        self.consumer: Any = None
        # The version of the configuration whose queues are listed.
        self.served = -1
        self.is_stopping = False

    def start(self, sender: Any, **_: Any) -> None:
        """Signal `worker_ready`: the consumer is there. It comes again where Celery made a new
        one."""
        is_first, self.consumer = self.consumer is None, sender
        if is_first:
            threading.Thread(target=self.follow, name="follow-config", daemon=True).start()
            threading.Thread(target=self.end, name="end", daemon=True).start()
            signal.signal(signal.SIGTERM, self.stop)
            memory.keep()

    def stop(self, *_: Any, **__: Any) -> None:
        """SIGTERM, and Celery's signal `worker_shutting_down` for others. A handler may come in the
        middle of anything, locks included: it only sets this."""
        self.is_stopping = True

    def end(self) -> None:
        """Once told to stop: no more tasks are sent here or taken, those under way get GRACE_S."""
        while not self.is_stopping:
            time.sleep(LOOK_S)
        threading.Thread(target=pulse.drain, name="drain", daemon=True).start()
        pulse.serve([])
        self.consumer.call_soon(self.leave_queues)
        time.sleep(LAST_MESSAGE_S)
        # Celery's warm shutdown: it waits for the tasks under way.
        state.should_stop = 0  # type: ignore[assignment]

    def leave_queues(self) -> None:
        """In the consumer's thread."""
        for name in list(self.consumer.task_consumer._queues):
            self.consumer.cancel_task_queue(name)

    def follow(self) -> None:
        asked_at = float("-inf")
        asked = -1
        while not self.is_stopping:
            version = pulse.config_version()
            is_due = version != asked or time.monotonic() - asked_at >= AGAIN_S
            if version != self.served and is_due:
                try:
                    providers = sorted(routing.snapshot().providers)
                    buckets = tasks.backstops()
                except OperationalError:
                    log.warning("the configuration can't be read: Postgres is away")
                else:
                    self.consumer.call_soon(self.serve, providers, buckets, version)
                finally:
                    stores.release()
                asked, asked_at = version, time.monotonic()
            time.sleep(LOOK_S)

    def serve(self, providers: list[str], buckets: dict[str, TokenBucket], version: int) -> None:
        """In the consumer's thread: tasks and queues for all providers, then say so."""
        if self.is_stopping:
            return
        tasks.register(current_app, providers)
        for provider in providers:
            name = queues.task_name(provider)
            self.consumer.task_buckets[name] = buckets.get(name)
        self.consumer.update_strategies()
        names = queues.all_queues(providers, self.lane)
        for name in names:
            if not self.consumer.task_consumer.consuming_from(name):
                self.consumer.add_task_queue(name)
        pulse.serve(names)
        self.served = version
