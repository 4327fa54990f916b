"""`up`: starts everything, shows that it works, and stays until it is told to end."""

import os
import signal
import time
from pathlib import Path
from typing import NoReturn

from project.stack import credentials, demo, environment, ports, prepare, processes
from project.stack.console import Terminal, say
from project.stack.demo import Demo
from project.stack.errors import StackError, Stopped
from project.stack.layout import Layout, holder, locked, remove_sockets, write_private
from project.stack.manager import Manager, interpreter
from project.stack.owner import Servers, check_external
from project.stack.processes import PROGRAM, Child, marked, tail
from project.stack.programs import programs

READY_S = 120.0
# How long Flower is waited for, and how often it is to ask the workers for their queues.
FLOWER_S = 30.0


def up(data: Path | str, *, with_parent: bool) -> int:
    if with_parent:
        end_with_make()
    layout = Layout.at(data)
    with locked(layout.lock) as mine:
        if not mine:
            raise StackError(
                f"it is already up here (pid {holder(layout.lock)}): see {layout.demo},"
                " or end it with `make down`"
            )
        processes.raise_on_signals()
        try:
            return Stack(layout).run()
        except Stopped:
            say("everything has ended")
            return 0


def end_with_make() -> None:
    """A `make` that is killed takes us along, as Ctrl-C would."""
    parent = os.getppid()
    processes.end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        raise StackError("make has ended already")


class Stack:
    """Everything that `make up` starts, in the order in which it is started."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.terminal = Terminal()
        self.settings = environment.own()
        self.credentials = credentials.load(layout) | environment.chosen(self.settings)
        self.places = environment.places(self.settings, layout)
        self.servers = Servers(
            layout,
            self.credentials["valkey_password"],
            database_url=self.settings.get("DATABASE_URL", ""),
            redis_url=self.settings.get("REDIS_URL", ""),
        )
        self.manager: Manager | None = None

    def run(self) -> int:
        began = time.monotonic()
        try:
            self.start()
            found = self.demo()
            self.show(found)
            seconds = time.monotonic() - began
            say(f"Up after {seconds:.1f} s. Ctrl-C, or `make down` elsewhere, ends everything.")
            self.stay(found)
        except Stopped:
            say("stopping…")
            raise
        finally:
            self.stop()

    def stay(self, found: Demo) -> NoReturn:
        """Look after everything until a signal ends us."""
        refresh_at = 0.0
        while not self.terminal.is_gone():
            self.servers.watch()
            if self.manager:
                self.manager.watch()
            if time.monotonic() >= refresh_at:
                refresh_at = time.monotonic() + FLOWER_S
                demo.refresh_flower(found)
            time.sleep(1.0)
        raise Stopped(signal.SIGHUP)

    def start(self) -> None:
        # Written anew once all is ready.
        self.layout.demo.unlink(missing_ok=True)
        if left := processes.end_all(self.layout.data):
            say(f"ended {left} processes that an earlier run left behind")
        self.check_ports()
        check_external(self.servers.database_url, self.servers.redis_url)
        self.servers.start()
        settings = environment.for_programs(
            self.settings,
            self.credentials,
            self.places,
            self.servers.database_url,
            self.servers.redis_url,
        )
        write_private(self.layout.environment, environment.to_keep(settings))
        self.manager = Manager(
            self.layout,
            programs(interpreter(), self.places),
            settings,
            interpreter(),
            self.places.grace_s,
        )
        self.manager.start()
        seeds = settings | environment.for_seed(self.credentials)
        if not prepare.is_done(self.layout, seeds):
            preparation = self.preparation(seeds)
            preparation.start()
            self.manager.start_stage(0)
            self.wait_for(preparation)
            prepare.remember(self.layout, seeds)
        self.manager.start_stage(1)
        self.wait_for_web()
        self.manager.start_stage(2)

    def check_ports(self) -> None:
        ports.require_free({"PORT": self.places.port}, self.places.bind)
        ports.require_free(
            {"FLOWER_PORT": self.places.flower_port, "SANDBOX_PORT": self.places.sandbox_port}
        )

    def preparation(self, settings: dict[str, str]) -> Child:
        """Tables, seed, static files, in a process of their own."""
        log = self.layout.logs / "prepare.log"
        log.write_bytes(b"")
        return Child(
            name="the preparation",
            command=[interpreter(), "-m", "project.stack.prepare"],
            log=log,
            environment=marked(self.layout.data, PROGRAM, settings),
        )

    def wait_for(self, preparation: Child) -> None:
        process = preparation.process
        if process is None or process.wait() != 0:
            log = preparation.log
            raise StackError(f"the database can't be prepared: {tail(log, 1)} (see {log})")

    def wait_for_web(self) -> None:
        """Ready by its own word; and the sandbox, without which the first requests would fail."""
        self.wait_for_answer("web", f"{self.base_url}/readyz")
        self.wait_for_answer("sandbox", f"{self.sandbox_url}/_calls")

    def wait_for_answer(self, program: str, url: str) -> None:
        deadline = time.monotonic() + READY_S
        answer: object = "no answer"
        while time.monotonic() < deadline:
            try:
                status, answer = demo.get(url, timeout_s=2.0)
                if status == 200:
                    return
            except OSError as error:
                answer = error
            time.sleep(0.1)
        log = self.layout.logs / f"{program}.log"
        raise StackError(f"{program} is not ready: {str(answer)[:200]} (see {log})")

    @property
    def sandbox_url(self) -> str:
        return f"http://127.0.0.1:{self.places.sandbox_port}"

    @property
    def base_url(self) -> str:
        host = self.places.bind if self.places.bind not in {"0.0.0.0", "::"} else "127.0.0.1"  # noqa: S104
        return f"http://{host}:{self.places.port}"

    def demo(self) -> Demo:
        return Demo(
            base_url=self.base_url,
            api_key=self.credentials["api_key"],
            admin_url=f"{self.base_url}/admin/",
            admin_user=environment.ADMIN_USER,
            admin_password=self.credentials["admin_password"],
            flower_url=f"http://127.0.0.1:{self.places.flower_port}/",
            flower_user=environment.FLOWER_USER,
            flower_password=self.credentials["flower_password"],
            database_url=self.servers.database_url,
            redis_url=self.servers.redis_url,
            sandbox_url=self.sandbox_url,
        )

    def show(self, found: Demo) -> None:
        """That it works: one request through each door, then every link."""
        say()
        for mode, work in (("inline", demo.run_inline), ("queued", demo.run_queued)):
            try:
                say(demo.describe(mode, work(self.base_url, found.api_key)))
            except (StackError, OSError) as error:
                say(f"  {mode:<8} {error} (see {self.layout.logs})")
        deadline = time.monotonic() + FLOWER_S
        while not demo.refresh_flower(found) and time.monotonic() < deadline:
            time.sleep(0.1)
        write_private(self.layout.demo, found.as_json())
        say()
        for line in demo.links(found):
            say(line)
        say()

    def stop(self) -> None:
        processes.ignore_signals()
        if self.manager:
            self.manager.stop()
        self.servers.stop()
        # Whatever slipped through: a program that was just being started, say.
        processes.end_all(self.layout.data)
        remove_sockets(self.layout)
