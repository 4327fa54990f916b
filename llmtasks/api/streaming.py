"""Server-sent events: the chunks of a streamed chat, and what happens to a task."""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import partial
from socket import socket
from typing import Any

import orjson
from django.conf import settings
from django.http import HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from llmtasks import execute, pulse, stores, watchers
from llmtasks.api import answers, limits
from llmtasks.api.errors import Ended, as_api_error, openai_body
from llmtasks.api.waiting import look, look_interval
from llmtasks.events import Event
from llmtasks.execute import Outcome
from llmtasks.models import FINAL, Task
from llmtasks.watchers import FIRST_ID, Watcher
from providers.types import Request, Response, StreamEvent

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
RETRY_MS = 1000
# The id of every `done`: who resumes after it has seen the end.
DONE = "done"
DONE_FRAME = b"data: [DONE]\n\n"


class Frames:
    """A stream's frames, and what must be closed with it, begun or not."""

    def __init__(self, frames: Iterator[bytes], *closers: Callable[[], None]) -> None:
        self.frames = frames
        self.closers = closers

    def __iter__(self) -> Iterator[bytes]:
        return self.frames

    def close(self) -> None:
        """Called by the server when the stream ended or the client left."""
        with ExitStack() as stack:
            for closer in self.closers:
                stack.callback(closer)


def event_stream(frames: Frames) -> StreamingHttpResponse:
    response = StreamingHttpResponse(frames, content_type="text/event-stream")
    response["Cache-Control"] = "no-cache"
    # Proxies that buffer (nginx) would hold the stream back.
    response["X-Accel-Buffering"] = "no"
    return response


# --- A streamed chat ------------------------------------------------------------------------


def stream_chat(
    task: Task, request: Request, include_usage: bool, client: socket | None = None
) -> StreamingHttpResponse:
    """Run the task and stream it. What fails before the first delta is a plain HTTP error."""
    context = execute.inline_context(task, streams=True, client=client)
    events: Any = execute.stream(task, request, context)
    first = next(events)
    if isinstance(first, Outcome) and first.response is None:
        events.close()
        raise Ended(first.task, limits.headers(first.limits))
    frames = chat_frames(task, first, events, include_usage)
    ended = partial(execute.leave, events)
    response = tell_task(event_stream(Frames(frames, ended, frames.close)), task)
    for name, value in limits.headers(context.own_limits).items():
        response[name] = value
    return response


def replay_chat(task: Task, response: Response, include_usage: bool) -> StreamingHttpResponse:
    """Stream an answer that is there already."""
    events: Iterator[StreamEvent | Outcome] = iter(
        [*answers.deltas_of(response), Outcome(task, response)]
    )
    frames = chat_frames(task, next(events), events, include_usage)
    return tell_task(event_stream(Frames(frames, frames.close)), task)


def tell_task(response: StreamingHttpResponse, task: Task) -> StreamingHttpResponse:
    response["x-llmtasks-task-id"] = str(task.id)
    return response


def chat_frames(
    task: Task,
    event: StreamEvent | Outcome | None,
    events: Iterator[StreamEvent | Outcome],
    include_usage: bool,
) -> Generator[bytes, None, None]:
    """OpenAI's chunks. An error in the middle is a frame of its own, and the end."""
    # With usage asked for, every chunk but the last says that it has none.
    silent = {"usage": None} if include_usage else {}
    yield data(answers.chunk(task, {"role": "assistant", "content": ""}) | silent)
    try:
        while event is not None:
            if isinstance(event, Outcome):
                yield from last_frames(event, include_usage, silent)
                return
            if delta := answers.delta_of(event):
                yield data(answers.chunk(task, delta) | silent)
            event = next(events, None)
    except Exception as error:  # noqa: BLE001 - logged there; the status was sent long ago
        yield data(openai_body(as_api_error(error)))


def last_frames(outcome: Outcome, include_usage: bool, silent: dict[str, Any]) -> Iterator[bytes]:
    if not isinstance(outcome.response, Response):
        yield data(openai_body(Ended(outcome.task)))
        return
    for chunk in answers.last_chunks(outcome.task, outcome.response, include_usage):
        yield data(silent | chunk)
    yield DONE_FRAME


def data(body: Any) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


# --- A task's events ------------------------------------------------------------------------


def stream_events(task: Task, after: str | None) -> HttpResponseBase:
    """The events of a task after the id `after`. Raises TooManyWatchers."""
    if task.status in FINAL and after == DONE:
        return HttpResponse(status=204)  # EventSource takes it as: don't come back
    stack = ExitStack()
    watcher = stack.enter_context(watchers.watch(task.id, after))
    stores.release()
    frames = event_frames(task, watcher, is_new=after is None)
    return event_stream(Frames(frames, stack.close, frames.close))


def event_frames(task: Task, watcher: Watcher, *, is_new: bool) -> Generator[bytes, None, None]:
    """Until the task is done, STREAM_S is over or this process is to end; then the browser comes
    back by itself."""
    yield b"retry: %d\n\n" % RETRY_MS
    if is_new or watcher.is_lost:
        if task.status in FINAL:
            yield done(task)
            return
        resumes = watcher.last if watcher.last != FIRST_ID else None
        yield frame(resumes, "snapshot", task_json(task))
    until = time.monotonic() + settings.LLMTASKS["STREAM_S"]
    looked = beat = time.monotonic()
    while (now := time.monotonic()) < until and not pulse.is_draining():
        event = watcher.next(min(look_interval(), until - now))
        if event is not None and event.name != "done":
            yield frame(event.id, event.name, event.data)
        if is_time_to_look(event, looked):
            looked, task = time.monotonic(), look(task)
            if task.status in FINAL:
                yield done(task)
                return
        if time.monotonic() - beat >= HEARTBEAT_S:
            beat = time.monotonic()
            yield b": here\n\n"


def is_time_to_look(event: Event | None, looked: float) -> bool:
    """An event can be lost: now and then the row itself is asked."""
    if event is None or event.name == "done":
        return True
    return time.monotonic() - looked >= look_interval()


def done(task: Task) -> bytes:
    return frame(DONE, "done", task_json(task))


def task_json(task: Task) -> bytes:
    return orjson.dumps(answers.task_row(task), option=orjson.OPT_UTC_Z)


def frame(event_id: str | None, name: str, text: bytes) -> bytes:
    lines = b"" if event_id is None else b"id: " + event_id.encode() + b"\n"
    return lines + b"event: " + name.encode() + b"\ndata: " + text + b"\n\n"
