"""`manage.py dispatcher`: releases waiting tasks and puts back what got stuck."""

import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from llmtasks import checks, pulse, sweep
from llmtasks.dispatch import Dispatcher
from llmtasks.models import Worker


class Command(BaseCommand):
    help = "Release waiting tasks to the workers, and put back what got stuck. Run one or more."

    def handle(self, **options: Any) -> None:
        if wrong := checks.redis_version():
            raise CommandError(wrong)
        stopped = threading.Event()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: stopped.set())
        pulse.start(Worker.Role.DISPATCHER)
        Dispatcher(sweep.run, stopped, sweep.take_over).run()
        pulse.stop()
