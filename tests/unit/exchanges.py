"""Calls of an adapter over real sockets, and what ends them."""

import contextlib
import socket
import threading
import time

import orjson
import pytest

from providers import errors, registry
from providers.base import Account
from providers.http import Exchange
from providers.types import Message, Request, Text

WHOLE = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
)


def chat(model="echo", text="Hello, world!", *more, **fields):
    messages = (Message(role="user", parts=(Text(text=text),)), *more)
    return Request(model=model, messages=messages, **fields)


def provider(base_url, **account):
    return registry.build("compatible", Account(name="test", base_url=base_url, **account))


def call(server, request=None, exchange=None, **account):
    account = {"api_key": "sk-test", **account}
    return provider(server.base_url, **account).complete(request or chat(), exchange or Exchange())


def once(data, *, then_close=True):
    """A script that answers each request with `data`."""

    def script(peer, _number):
        while peer.read():
            peer.send(data)
            if then_close:
                return

    return script


def until(condition):
    """Wait for it, for a few seconds."""
    deadline = time.monotonic() + 3
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def dropped_after(seconds, exchange, run, once=lambda: True):
    """`run()` must end by `Dropped` within a second of the drop, which comes so long after `once()`
    is true."""
    dropped_at = []

    def drop():
        until(once)
        time.sleep(seconds)
        dropped_at.append(time.monotonic())
        exchange.drop("cancel")

    thread = threading.Thread(target=drop)
    thread.start()
    with pytest.raises(errors.Dropped) as caught:
        run()
    ended_at = time.monotonic()
    thread.join()
    assert caught.value.reason == "cancel"
    assert ended_at - dropped_at[0] < 1


@contextlib.contextmanager
def full_listener():
    """A port whose SYNs are never answered: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
