"""Prompts over the API: versions, labels, and chats that name them."""

import threading
from typing import Any
from uuid import UUID

import pytest
from django.db import IntegrityError, connection, transaction

from llmtasks import prompts
from llmtasks.models import Prompt, PromptLabel, PromptVersion, Provider, Task, TaskPayload
from tests import factories
from tests.callers import Caller, frames_of, work_off


@pytest.fixture
def caller(account: Provider) -> Caller:
    for name in ("echo", "error-500"):
        factories.route(name, (account, name))
    return Caller(factories.tenant())


def add(caller: Caller, text: str = "Hello {{ name }}", name: str = "greet", **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return caller.post("/v1/prompts", {"name": name, "messages": messages, **fields})


def chat(caller: Caller, prompt: str = "greet", **fields: Any) -> Any:
    given = {"prompt": prompt, "variables": {"name": "Ann"}, **fields.pop("input", {})}
    return caller.post("/v1/tasks", {"kind": "chat", "mode": "inline", "input": given, **fields})


def test_versions_are_added_and_never_changed(caller: Caller) -> None:
    first = add(caller, model="echo", note="the first", labels=["production"])
    assert first.status_code == 201
    body = first.json()
    assert (body["prompt"], body["version"], body["model"]) == ("greet@1", 1, "echo")
    assert body["created_by"] == f"key {caller.key.id}"
    # Repeating it adds nothing.
    again = add(caller, model="echo", note="the first", labels=["production"])
    assert (again.status_code, again.json()) == (200, body)
    assert add(caller, "Hi {{ name }}", model="echo").json()["version"] == 2
    shown = caller.get("/v1/prompts/greet").json()
    assert (shown["latest"], shown["labels"]) == (2, {"production": {"version": 1}})
    assert [version["version"] for version in shown["versions"]] == [2, 1]
    assert caller.get("/v1/prompts/greet/versions/1").json() == body
    [listed] = caller.get("/v1/prompts").json()["data"]
    assert (listed["name"], listed["latest"]) == ("greet", 2)
    with pytest.raises(IntegrityError, match="is kept"), transaction.atomic():
        PromptVersion.objects.filter(number=1).update(note="another")
    with pytest.raises(IntegrityError, match="is kept"), transaction.atomic():
        PromptVersion.objects.filter(number=1)._raw_delete("default")


def test_a_chat_is_made_of_a_prompt_and_says_which(caller: Caller) -> None:
    add(caller, model="echo", labels=["production"], parameters={"max_tokens": 50})
    body = chat(caller).json()
    assert (body["status"], body["prompt"], body["model"]) == ("succeeded", "greet@1", "echo")
    assert body["output"]["choices"][0]["message"]["content"] == "Hello Ann"
    stored = TaskPayload.objects.get(task_id=body["id"]).request
    assert stored["max_output_tokens"] == 50
    # What is said beside it comes after it.
    more = chat(caller, input={"messages": [{"role": "user", "content": "and Bob"}]}).json()
    assert more["output"]["choices"][0]["message"]["content"] == "and Bob"
    assert len(TaskPayload.objects.get(task_id=more["id"]).request["messages"]) == 2
    tasks = caller.get("/v1/tasks?prompt=greet@1").json()["data"]
    assert {task["id"] for task in tasks} == {body["id"], more["id"]}
    assert caller.get("/v1/tasks?prompt=greet@2").json()["data"] == []
    assert caller.task().json()["prompt"] is None


def test_queued_work_and_its_retry_say_which_too(caller: Caller) -> None:
    add(caller, model="echo", labels=["production"])
    task_id = chat(caller, mode="queued").json()["id"]
    add(caller, "Another {{ name }}", model="echo", labels=["production"])
    work_off(task_id)
    body = caller.get(f"/v1/tasks/{task_id}").json()
    assert (body["prompt"], body["status"]) == ("greet@1", "succeeded")
    # A retry sends what was sent.
    again = caller.post(f"/v1/tasks/{task_id}/retry").json()
    assert again["prompt"] == "greet@1"
    bulk = {
        "tasks": [
            {"kind": "chat", "input": {"prompt": "greet", "variables": {"name": "x"}}},
            {"kind": "chat", "input": {"prompt": "greet", "variables": {}}},
            {"kind": "chat", "input": {"prompt": "nothing"}},
        ]
    }
    found = caller.post("/v1/tasks/bulk", bulk).json()["data"]
    assert found[0]["task"]["prompt"] == "greet@2"
    assert found[1]["error"]["param"] == "tasks[1].input.variables.name"
    assert (found[2]["error"]["status"], found[2]["error"]["param"]) == (
        404,
        "tasks[2].input.prompt",
    )


def test_the_official_path_takes_it_in_its_extra_body(caller: Caller) -> None:
    add(caller, labels=["production"], model="echo")
    given = {"messages": [], "prompt": "greet", "variables": {"name": "Ann"}}
    answer = caller.post("/v1/chat/completions", {"model": "", **given})
    assert answer.json()["choices"][0]["message"]["content"] == "Hello Ann"
    assert Task.objects.get(id=answer["x-llmtasks-task-id"]).prompt == "greet@1"
    streamed = caller.post("/v1/chat/completions", {"model": "echo", "stream": True, **given})
    assert frames_of(streamed)[-1][2] == "[DONE]"
    assert Task.objects.filter(prompt="greet@1").count() == 2
    # Without a prompt nothing is different.
    assert caller.chat(model="").status_code == 400
    assert caller.chat(prompt=None, variables=None).status_code == 200
    wrong = caller.chat(variables={"a": 1}).json()["error"]
    assert (wrong["param"], wrong["message"]) == ("variables", "variables: these go with a prompt")


@pytest.mark.parametrize(
    ("given", "status", "param", "detail"),
    [
        ({"prompt": "nothing"}, 404, "input.prompt", "there is no prompt 'nothing'"),
        ({"prompt": "greet@9"}, 404, "input.prompt", "there is production, versions up to 1"),
        ({"prompt": "greet@canary"}, 404, "input.prompt", "there is no greet@canary"),
        ({"prompt": "Greet!"}, 400, "input.prompt", "write name, name@3 or name@label"),
        ({"prompt": 3}, 400, "input.prompt", "give a name"),
        ({"prompt": "greet", "variables": []}, 400, "input.variables", "give an object"),
        ({"prompt": "greet", "variables": {}}, 400, "input.variables.name", "needs this variable"),
        (
            {"prompt": "greet", "variables": {"name": "x", "age": 3}},
            400,
            "input.variables.age",
            "has no such variable: it has name",
        ),
    ],
)
def test_what_is_wrong_is_named(
    caller: Caller, given: Any, status: int, param: str, detail: str
) -> None:
    add(caller, labels=["production"])
    answer = caller.post("/v1/tasks", {"kind": "chat", "input": {"model": "echo", **given}})
    body = answer.json()
    assert (answer.status_code, body["param"]) == (status, param), body
    assert detail in body["detail"]
    assert not Task.objects.exists()


def test_a_prompt_without_a_model_needs_one(caller: Caller) -> None:
    add(caller, labels=["production"])
    assert chat(caller).json()["param"] == "input.model"
    assert chat(caller, input={"model": "echo"}).json()["status"] == "succeeded"


# --- labels ---------------------------------------------------------------------------------------


def test_a_canary_takes_its_share_of_production(caller: Caller) -> None:
    # By its id the share takes the same users each time.
    prompt = Prompt.objects.create(id=UUID(int=1), tenant=caller.tenant, name="greet")
    add(caller, "one {{ name }}", model="echo", labels=["production"])
    add(caller, "two {{ name }}", model="echo", labels=["staging"])
    label = {"label": "canary", "version": 2, "share": 30}
    shown = caller.post("/v1/prompts/greet/labels", label).json()
    assert shown["labels"]["canary"] == {"version": 2, "share": 30}
    tenant = caller.tenant.id

    def of(whose: str, reference: str = "greet") -> int:
        return prompts.chosen(tenant, reference, whose).number

    buckets = {f"u-{number}": prompts.bucket(prompt.id, f"u-{number}") for number in range(2000)}
    assert set(buckets.values()) == set(range(100))
    assert 560 < sum(bucket < 30 for bucket in buckets.values()) < 640
    users = list(buckets)[:20]
    found = {user: of(user) for user in users}
    assert found == {user: 2 if buckets[user] < 30 else 1 for user in users}
    assert set(found.values()) == {1, 2}
    assert found == {user: of(user, "greet@production") for user in users}
    assert {of(user, "greet@canary") for user in users} == {2}
    # A larger share keeps whom it has; none takes nobody; a fixed version is that version.
    caller.post("/v1/prompts/greet/labels", {**label, "share": 60})
    assert all(of(user) == 2 for user in users if found[user] == 2)
    caller.post("/v1/prompts/greet/labels", {**label, "share": 0})
    assert {of(user) for user in users} == {1}
    caller.post("/v1/prompts/greet/labels", {**label, "share": 100})
    assert {of(user) for user in users} == {2} and of("u", "greet@1") == 1
    # Moved without a share, it keeps its own.
    caller.post("/v1/prompts/greet/labels", {"label": "canary", "version": 1})
    assert PromptLabel.objects.get(name="canary").share == 100
    chosen = {chat(caller, user="u_42").json()["prompt"] for _ in range(3)}
    assert len(chosen) == 1
    gone = caller.post("/v1/prompts/greet/labels", {"label": "canary", "version": None}).json()
    assert set(gone["labels"]) == {"production", "staging"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"label": "production", "version": 9}, 404),
        ({"label": "production", "version": 1, "share": 10}, 400),
        ({"label": "canary", "version": 1, "share": 101}, 400),
        ({"label": "Canary!", "version": 1}, 400),
        ({"label": "production"}, 400),
    ],
)
def test_labels_that_can_not_be(caller: Caller, body: Any, status: int) -> None:
    add(caller)
    assert caller.post("/v1/prompts/greet/labels", body).status_code == status
    assert not PromptLabel.objects.exists()


# --- who may --------------------------------------------------------------------------------------


def test_a_tenant_sees_and_uses_its_own_only(caller: Caller) -> None:
    add(caller, labels=["production"], model="echo")
    other = Caller(factories.tenant())
    assert other.get("/v1/prompts").json()["data"] == []
    for path in ("", "/versions/1"):
        assert other.get(f"/v1/prompts/greet{path}").status_code == 404
    label = {"label": "production", "version": 1}
    assert other.post("/v1/prompts/greet/labels", label).status_code == 404
    assert chat(other).status_code == 404
    assert add(other, "theirs {{ name }}").json()["version"] == 1
    assert chat(caller).json()["output"]["choices"][0]["message"]["content"] == "Hello Ann"


def test_scopes(caller: Caller) -> None:
    add(caller, labels=["production"], model="echo")
    reader = Caller(caller.tenant, scopes=["read"])
    writer = Caller(caller.tenant, scopes=["write"])
    assert reader.get("/v1/prompts/greet").status_code == 200
    assert writer.get("/v1/prompts").status_code == 403
    label = {"label": "production", "version": 1}
    for one in (reader, writer):
        assert add(one).status_code == 403
        assert one.post("/v1/prompts/greet/labels", label).status_code == 403
    assert chat(writer).status_code == 200


def test_pages_of_prompts(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtasks.api.prompts.PAGE", 2)
    for name in ("a", "c", "b"):
        add(caller, name=name)
    first = caller.get("/v1/prompts").json()
    assert ([row["name"] for row in first["data"]], first["has_more"]) == (["a", "b"], True)
    rest = caller.get(f"/v1/prompts?cursor={first['next_cursor']}").json()
    assert ([row["name"] for row in rest["data"]], rest["next_cursor"]) == (["c"], None)


def test_versions_added_at_the_same_time_have_numbers_of_their_own(caller: Caller) -> None:
    def add_one(number: int) -> None:
        try:
            messages = [{"role": "user", "content": f"number {number}"}]
            prompts.add_version(caller.tenant.id, "greet", messages=messages)
        finally:
            connection.close()

    threads = [threading.Thread(target=add_one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = PromptVersion.objects.values_list("number", flat=True)
    assert sorted(numbers) == list(range(1, 9))
