"""The table of programs, and that docker compose and supervisord run exactly it."""

import configparser
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llmtasks.models import Lane
from project.stack import manager
from project.stack.layout import ROOT, Layout
from project.stack.programs import LANES, Places, programs

IN_CONTAINER = Places(bind="0.0.0.0", inner_bind="0.0.0.0")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(autouse=True)
def short_sockets(tmp_path, monkeypatch):
    """No folder in /tmp for a socket that nobody opens."""
    monkeypatch.setattr(Layout, "sockets", lambda layout: tmp_path)


def test_there_is_a_worker_for_each_lane():
    assert set(LANES) == set(Lane.values)


@pytest.mark.parametrize("program", programs("python", IN_CONTAINER), ids=lambda p: p.name)
def test_docker_compose_runs_the_same_commands(program):
    service = COMPOSE["services"][program.name]
    assert tuple(service["command"]) == program.command
    assert service["healthcheck"]["test"]


def test_docker_compose_has_no_programs_of_its_own():
    names = {program.name for program in programs("python", IN_CONTAINER)}
    assert set(COMPOSE["services"]) - names == {"postgres", "valkey", "prepare"}


def test_docker_compose_publishes_on_loopback_only():
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_secrets_that_docker_compose_needs_are_in_the_example():
    needed = set(re.findall(r"\$\{([A-Z_]+):\?", (ROOT / "docker-compose.yml").read_text()))
    example = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.M))
    assert needed <= example


def supervisor_file(tmp_path: Path, places: Places) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    table = programs("/a b/python", places)
    parser.read_string(manager.configuration(Layout.at(tmp_path), table, stop_s=7))
    return parser


def test_supervisord_runs_them_and_starts_each_again(tmp_path):
    found = supervisor_file(tmp_path, Places())
    table = programs("/a b/python", Places())
    assert found["group:llmtasks"]["programs"].split(",") == [program.name for program in table]
    for program in table:
        section = found[f"program:{program.name}"]
        assert tuple(shlex.split(section["command"])) == program.command
        assert section["autorestart"] == "true"
        assert section["stopwaitsecs"] == "7"
        assert section["stdout_logfile_maxbytes"] == manager.LOG_BYTES


def test_a_percent_sign_in_a_path_begins_no_expansion(tmp_path):
    found = supervisor_file(tmp_path / "100%", replace(Places(), beat_schedule="/x%y"))
    assert "/x%%y" in found["program:beat"]["command"]
    assert "100%%" in found["supervisord"]["logfile"]


def test_no_secret_is_in_a_command():
    words = " ".join(" ".join(program.command) for program in programs("python", Places()))
    assert not re.search("auth|password|secret", words)


def test_a_process_manager_that_cannot_be_reached_has_no_states(tmp_path):
    assert manager.Manager(Layout.at(tmp_path), [], {}, "python").states() == {}
