"""`manage.py dispatcher`: releases waiting tasks, puts back what got stuck, sends webhooks."""

import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from llmtasks import checks, memory, pulse, sweep, webhooks
from llmtasks.dispatch import Dispatcher
from llmtasks.models import Worker


class Command(BaseCommand):
    help = "Release waiting tasks to workers, put back what got stuck, send webhooks. One or more."

    def handle(self, **options: Any) -> None:
        if wrong := checks.redis_version():
            raise CommandError(wrong)
        stopped = threading.Event()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: stopped.set())
        pulse.start(Worker.Role.DISPATCHER)
        webhooks.Sender(stopped).start()
        memory.keep()
        Dispatcher(sweep.run, stopped, sweep.take_over).run()
        pulse.stop()
