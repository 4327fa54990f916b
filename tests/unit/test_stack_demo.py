import json
import shlex
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from project.stack import demo
from project.stack.demo import Demo
from project.stack.errors import StackError

EXAMPLE = Demo(**{field.name: f"<{field.name}>" for field in fields(Demo)})
DONE = {
    "id": "1",
    "status": "succeeded",
    "output": {"choices": [{"message": {"content": "Hi"}}]},
    "usage": {"input_tokens": 3, "output_tokens": 2},
    "cost": "0.000011",
    "currency": "USD",
}


def test_the_demo_file_holds_what_was_promised():
    assert list(json.loads(EXAMPLE.as_json())) == [
        *("base_url", "api_key", "admin_url", "admin_user", "admin_password"),
        *("flower_url", "flower_user", "flower_password"),
        *("database_url", "redis_url", "sandbox_url"),
    ]


def test_the_lines_to_paste_are_a_command_and_a_program():
    lines = demo.links(EXAMPLE)
    command = shlex.split(next(line for line in lines if line.startswith("curl")))
    assert json.loads(command[-1])["model"] == "echo"
    program = lines[lines.index("from openai import OpenAI  # pip install openai") :]
    assert len(program) == 4
    compile("\n".join(program), "example", "exec")


def test_an_answer_is_one_line():
    assert demo.describe("inline", DONE) == ("  inline   'Hi', 3 tokens in, 2 out, 0.000011 USD")
    failed = {**DONE, "status": "failed", "error": {"class": "Timeout"}}
    assert "failed: {'class': 'Timeout'}" in demo.describe("queued", failed)


@pytest.fixture
def api():
    """A server that answers the given (status, body) pairs in turn."""
    answers: list[tuple[int, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_queued_work_is_followed_to_its_end(api):
    url, answers = api
    answers += [(202, '{"id": "1", "status": "waiting"}'), (200, json.dumps(DONE))]
    assert demo.run_queued(url, "key") == DONE


def test_queued_work_that_never_ends_is_told(api, monkeypatch):
    url, answers = api
    monkeypatch.setattr(demo, "WAIT_S", 0.0)
    answers += [(202, '{"id": "1", "status": "waiting"}')]
    # With no time at all the request itself must still have some.
    monkeypatch.setattr(
        demo, "send", lambda request, key, timeout_s: (202, json.loads(answers.pop()[1]))
    )
    with pytest.raises(StackError, match="still waiting"):
        demo.run_queued(url, "key")


def test_a_refusal_is_told_with_its_body(api):
    url, answers = api
    answers.append((401, "no"))
    with pytest.raises(StackError, match="answered 401: no"):
        demo.run_inline(url, "key")
