"""The process manager: `supervisord`, which starts again each program that ends."""

import contextlib
import http.client
import os
import resource
import shlex
import socket
import sys
import time
import xmlrpc.client
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from project.stack import processes
from project.stack.console import say
from project.stack.errors import StackError
from project.stack.layout import ROOT, Layout, write_private
from project.stack.processes import PROGRAM, Child, marked, tail
from project.stack.programs import AFTER_GRACE_S, Program

GROUP = "llmtasks"
LOG_BYTES = "10MB"
LOGS_KEPT = 3
FILES_WANTED = 8192
READY_S = 20.0


def configuration(layout: Layout, programs: list[Program], stop_s: int) -> str:
    """supervisord's file. One group: then all its programs are told to stop at once."""
    section: list[str] = [
        "[unix_http_server]",
        f"file = {quoted(control_socket(layout))}",
        "chmod = 0600",
        "",
        "[supervisord]",
        "nodaemon = true",
        "silent = true",
        f"directory = {quoted(ROOT)}",
        f"logfile = {quoted(layout.logs / 'supervisord.log')}",
        f"logfile_maxbytes = {LOG_BYTES}",
        f"logfile_backups = {LOGS_KEPT}",
        f"pidfile = {quoted(layout.data / 'supervisord.pid')}",
        f"childlogdir = {quoted(layout.logs)}",
        f"minfds = {files_allowed()}",
        "",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        "",
        "[supervisorctl]",
        f"serverurl = unix://{quoted(control_socket(layout))}",
        "",
        f"[group:{GROUP}]",
        f"programs = {','.join(program.name for program in programs)}",
    ]
    for program in programs:
        section += ["", *program_section(layout, program, stop_s)]
    return "\n".join(section) + "\n"


def program_section(layout: Layout, program: Program, stop_s: int) -> list[str]:
    return [
        f"[program:{program.name}]",
        f"command = {quoted(shlex.join(program.command))}",
        f"directory = {quoted(ROOT)}",
        # `Manager` starts it at its time, at once; supervisord itself would wait a second.
        "autostart = false",
        "autorestart = true",
        "startsecs = 2",
        # Each try waits a second longer; `Manager.watch` revives what gave up.
        "startretries = 10",
        "stopsignal = TERM",
        f"stopwaitsecs = {stop_s}",
        "killasgroup = true",
        "redirect_stderr = true",
        f"stdout_logfile = {quoted(layout.logs / (program.name + '.log'))}",
        f"stdout_logfile_maxbytes = {LOG_BYTES}",
        f"stdout_logfile_backups = {LOGS_KEPT}",
    ]


def quoted(value: Path | str) -> str:
    """A value in supervisord's file, where % begins an expansion."""
    return str(value).replace("%", "%%")


def control_socket(layout: Layout) -> Path:
    return layout.sockets() / "supervisor.sock"


def files_allowed() -> int:
    """Open files per program: each call under way has a socket or two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self.path = path

    def connect(self) -> None:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(self.timeout)
        try:
            link.connect(str(self.path))
        except OSError:
            link.close()
            raise
        self.sock = link


class UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return UnixConnection(self.path)


@dataclass
class Manager:
    """supervisord as a child, and what is asked of it."""

    layout: Layout
    programs: list[Program]
    environment: dict[str, str]
    python: str
    grace_s: int = 20
    child: Child | None = None
    stage: int = -1

    @property
    def stop_s(self) -> int:
        """Seconds that a program has to end before it is killed."""
        return self.grace_s + AFTER_GRACE_S

    def start(self) -> None:
        """Start the process manager, without any program yet."""
        text = configuration(self.layout, self.programs, self.stop_s)
        write_private(self.layout.supervisor_conf, text)
        self.child = Child(
            name="supervisord",
            command=[
                *(self.python, "-m", "supervisor.supervisord"),
                *("-c", str(self.layout.supervisor_conf)),
            ],
            log=self.layout.logs / "supervisord.out",
            environment=marked(self.layout.data, PROGRAM, self.environment),
            patience_s=self.stop_s + 5.0,
        )
        self.child.start()

    def start_stage(self, stage: int) -> None:
        """Start the programs of this stage and of those before it that don't run."""
        self.stage = stage
        names = [f"{GROUP}:{program.name}" for program in self.programs if program.stage <= stage]
        self.insist(lambda supervisor: [start_one(supervisor, name) for name in names])

    def insist(self, question: Callable[[Any], Any]) -> None:
        """Ask until there is an answer: supervisord may still be starting itself."""
        deadline = time.monotonic() + READY_S
        while self.child and self.child.is_alive() and time.monotonic() < deadline:
            if self.ask(question) is not None:
                return
            time.sleep(0.02)
        log = self.layout.logs / "supervisord.out"
        raise StackError(f"the process manager did not start: {tail(log)} (see {log})")

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """Its answer; None while it can't be reached."""
        transport = UnixTransport(control_socket(self.layout))
        with contextlib.suppress(OSError, http.client.HTTPException, xmlrpc.client.Error):
            with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as server:
                return question(server.supervisor)
        return None

    def states(self) -> dict[str, str]:
        """Each program's state in supervisord's words; empty while it can't be reached."""
        found = self.ask(lambda supervisor: supervisor.getAllProcessInfo()) or []
        return {entry["name"]: entry["statename"] for entry in found}

    def watch(self) -> None:
        """One look: a supervisord that died is started again, and programs that gave up."""
        if self.child and not self.child.is_alive():
            say(f"the process manager died and is started again (see {self.child.log})")
            processes.end(self.layout.data, PROGRAM, self.stop_s)
            self.child.start()
            self.start_stage(self.stage)
        elif "FATAL" in self.states().values():
            self.start_stage(self.stage)

    def stop(self) -> None:
        if self.child:
            self.child.stop()


def start_one(supervisor: Any, name: str) -> bool:
    """Whether it was started; not where it runs already."""
    with contextlib.suppress(xmlrpc.client.Fault):
        return bool(supervisor.startProcess(name, False))
    return False


def interpreter() -> str:
    """The Python of our environment: programs run in the same one."""
    return os.path.abspath(sys.executable)
