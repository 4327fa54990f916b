import json
import stat

import pytest

from llmtasks.models.tenancy import split
from project.stack import credentials, environment
from project.stack.errors import StackError
from project.stack.layout import Layout
from project.stack.programs import Places


def test_an_env_file_is_read_as_docker_compose_reads_it(tmp_path):
    path = tmp_path / ".env"
    path.write_text("# comment\n\nA=1\nexport B = two words \nC='quoted # text'\nD=\"x=y\"\nE=\n")
    assert environment.read_env_file(path) == {
        "A": "1",
        "B": "two words",
        "C": "quoted # text",
        "D": "x=y",
        "E": "",
    }
    assert environment.read_env_file(tmp_path / "none") == {}


def test_what_is_set_wins_over_the_env_file(tmp_path):
    path = tmp_path / ".env"
    path.write_text("A=file\nB=file\n")
    found = environment.with_env_file({"A": "set", "B": ""}, path)
    assert (found["A"], found["B"]) == ("set", "file")


def test_a_bad_line_of_the_env_file_is_named(tmp_path):
    path = tmp_path / ".env"
    path.write_text("A=1\nnonsense\n")
    with pytest.raises(StackError, match="line 2"):
        environment.read_env_file(path)


@pytest.mark.parametrize("value", ["0", "65536", "-1", "http"])
def test_a_port_that_is_none_is_named(value):
    with pytest.raises(StackError, match="PORT is"):
        environment.number({"PORT": value}, "PORT", 8000)


def test_one_port_moves_all(tmp_path):
    layout = Layout.at(tmp_path)
    assert environment.places({}, layout).port == 8000
    where = environment.places({"PORT": "9000", "SANDBOX_PORT": "7000"}, layout)
    assert (where.port, where.flower_port, where.sandbox_port) == (9000, 9001, 7000)


def test_secrets_are_made_once_and_kept_for_their_owner_only(tmp_path):
    layout = Layout.at(tmp_path)
    made = credentials.load(layout)
    assert credentials.load(layout) == made
    assert stat.S_IMODE(layout.credentials.stat().st_mode) == 0o600
    assert set(made) == set(credentials.MAKERS)
    split(made["api_key"])


def test_a_secret_that_is_missing_is_added(tmp_path):
    layout = Layout.at(tmp_path)
    layout.credentials.write_text(json.dumps({"api_key": "kept"}))
    found = credentials.load(layout)
    assert found["api_key"] == "kept"
    assert found["secret_key"]


def test_unreadable_secrets_are_not_replaced(tmp_path):
    layout = Layout.at(tmp_path)
    layout.credentials.write_text("{")
    with pytest.raises(StackError, match=r"secrets\.json can't be read"):
        credentials.load(layout)


def test_secrets_may_be_chosen():
    found = environment.chosen({"ADMIN_PASSWORD": "mine", "SECRET_KEY": " "})
    assert found == {"admin_password": "mine"}


def test_what_programs_and_manage_get(tmp_path):
    secrets = dict.fromkeys(credentials.MAKERS, "s")
    found = environment.for_programs(
        {"OPENAI_API_KEY": "k"}, secrets, Places(), "postgresql://x", "redis://x"
    )
    assert found["OPENAI_API_KEY"] == "k"
    assert found["SANDBOX_URL"] == "http://127.0.0.1:8002"
    layout = Layout.at(tmp_path)
    with pytest.raises(StackError, match="nothing is up"):
        environment.kept(layout)
    layout.environment.write_text(environment.to_keep(found))
    assert environment.kept(layout) == {name: found[name] for name in environment.KEPT}


def test_marks_of_another_stack_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("LLMTASKS_STACK", "/elsewhere")
    assert "LLMTASKS_STACK" not in environment.own()
