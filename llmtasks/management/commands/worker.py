"""`manage.py worker --lane LANE`: a Celery worker that serves one lane of every provider."""

import socket
import threading
from typing import Any

from celery import current_app, signals
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import OperationalError

from llmtasks import checks, pulse, queues, routing, stores, tasks
from llmtasks.models import Lane, Worker

# How often a worker looks whether its pulse saw a new configuration.
LOOK_S = 0.1
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

    def start(self, sender: Any, **_: Any) -> None:
        """Signal `worker_ready`: the consumer is there."""
        self.consumer = sender
        threading.Thread(target=self.follow, name="follow-config", daemon=True).start()

    def follow(self) -> None:
        seen = -1
        while True:
            version = pulse.config_version()
            if version != seen:
                try:
                    providers = sorted(routing.snapshot().providers)
                except OperationalError:
                    version = seen
                else:
                    self.consumer.call_soon(self.serve, providers)
                finally:
                    stores.release()
                seen = version
            threading.Event().wait(LOOK_S)

    def serve(self, providers: list[str]) -> None:
        """In the consumer's thread: tasks and queues for all providers, then say so."""
        tasks.register(current_app, providers)
        self.consumer.update_strategies()
        names = queues.all_queues(providers, self.lane)
        for name in names:
            if not self.consumer.task_consumer.consuming_from(name):
                self.consumer.add_task_queue(name)
        pulse.serve(names)
