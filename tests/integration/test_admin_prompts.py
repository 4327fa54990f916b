"""The admin's pages of prompts and feedback."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.urls import reverse
from django.utils import timezone

from llmtasks import feedback, prompts
from llmtasks.models import CostState, Feedback, Prompt, PromptLabel, PromptVersion, Task, Tenant
from tests.admin_pages import (
    EVIL,
    changelist,
    make_attempt,
    make_task,
    page,
    squeezed,
    text,
)

pytestmark = pytest.mark.django_db

ADD = "/admin/llmtasks/promptversion/add/"


def add(tenant: Tenant, said: str = "Hello {{ name }}", **fields: Any) -> PromptVersion:
    messages = [{"role": "user", "content": said}]
    return prompts.add_version(tenant.pk, "greet", messages=messages, **fields)[0]


def ran(tenant: Tenant, prompt: str, *, took_s: float = 1, **values: Any) -> Task:
    end = timezone.now()
    given = {"status": "succeeded", "cost": Decimal("0.01"), "cost_state": CostState.FINAL}
    times = {"started_at": end - timedelta(seconds=took_s), "finished_at": end}
    return make_task(tenant, prompt=prompt, **{**times, **given, **values})


def rated(task: Task, score: float | None, source: str = "user", **fields: Any) -> None:
    feedback.put(
        Feedback(tenant_id=task.tenant_id, task_id=task.pk, source=source, score=score, **fields)
    )


def test_versions_stand_side_by_side(login: Any, tenant: Tenant) -> None:
    add(tenant, labels=["production"], note=EVIL)
    second = add(tenant, f"Hello {EVIL} {{{{ name }}}}", labels=["canary"])
    prompts.put_label(second, "canary", share=20)
    for took_s in (1, 2, 3):
        rated(ran(tenant, "greet@1", took_s=took_s), -1)
    ran(tenant, "greet@1", status="failed", cost=Decimal("0.05"))
    rated(ran(tenant, "greet@2", took_s=9), 0.5)
    # Another tenant's prompt of that name, and an old task, are not counted.
    ran(Tenant.objects.create(name="other"), "greet@1")
    prompt = Prompt.objects.get()
    content = squeezed(login("*").get(page("prompt", prompt.pk)))
    assert EVIL not in content
    first = PromptVersion.objects.get(number=1)
    one = content[content.index(page("promptversion", first.pk)) :]
    for shown in ("production", "<td>4</td>", "<td>25.0%</td>", "<td>$0.02</td>", "<td>2.0 s</td>",
                  "<td>2.9 s</td>", "<td>-1.00</td>", "<td>3</td>"):  # fmt: skip
        assert shown in one, shown
    assert "canary 20%" in content and "<td>+0.50</td>" in content
    assert 'class="lt-differs"><td class="lt-left">Hello {{ name }}</td>' in content


def test_any_two_versions_are_compared(login: Any, tenant: Tenant) -> None:
    for number in range(3):
        add(tenant, f"same\nline {number}", parameters={"temperature": number / 10})
    url = page("prompt", Prompt.objects.get().pk)
    content = squeezed(login("*").get(f"{url}?left=1&right=3&age=1d"))
    assert '<td class="lt-left">line 0</td><td class="lt-left">line 2</td>' in content
    assert (
        '<tr class="lt-same"><td class="lt-left">same</td><td class="lt-left">same</td>' in content
    )
    assert "temperature: 0.0" in content and "temperature: 0.2" in content
    assert text(login("*").get(f"{url}?left=9&right=x&age=nonsense"))


def test_a_version_is_added_by_the_form_and_stays(login: Any, tenant: Tenant) -> None:
    first = add(tenant)
    client = login("*")
    content = text(client.get(f"{ADD}?prompt={first.prompt_id}"))
    assert "Hello {{ name }}" in content
    values = {
        "prompt": str(first.prompt_id),
        "messages": '[{"role": "user", "content": "Hi {{ name }}"}]',
        "variables": "{}", "parameters": '{"temperature": 0.5}', "model": "smart", "note": "new",
    }  # fmt: skip
    assert client.post(ADD, values).status_code == 302
    second = PromptVersion.objects.get(number=2)
    assert (second.messages[0]["content"], second.parameters) == (
        "Hi {{ name }}",
        {"temperature": 0.5},
    )
    assert second.created_by.startswith("user-")
    assert "Hi {{ name }}" in text(client.get(page("promptversion", second.pk)))
    assert client.post(page("promptversion", second.pk), values).status_code == 403
    assert (
        client.post(reverse("admin:llmtasks_promptversion_delete", args=(second.pk,))).status_code
        == 403
    )
    assert login("view_promptversion").get(ADD).status_code == 403


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("messages", '[{"role": "user", "content": "{{ 1 }}"}]', "names no variable"),
        ("messages", "no json", "Enter a valid JSON"),
        ("variables", '{"properties": {"x": {"pattern": "a"}}}', "the keyword pattern"),
        ("parameters", '{"stream": true}', "a prompt can&#x27;t set this"),
    ],
)
def test_a_version_that_is_wrong_is_told_at_its_field(
    login: Any, tenant: Tenant, field: str, value: str, told: str
) -> None:
    prompt = add(tenant).prompt_id
    values = {
        "prompt": str(prompt), "messages": '[{"role": "user", "content": "x"}]', "variables": "",
        "parameters": "", "model": "", "note": "", field: value,
    }  # fmt: skip
    assert told in text(login("*").post(ADD, values))
    assert PromptVersion.objects.count() == 1


def labels_form(prompt: Prompt, *rows: dict[str, Any]) -> dict[str, Any]:
    found = list(prompt.labels.order_by("-name"))
    values: dict[str, Any] = {
        "description": "", "labels-TOTAL_FORMS": len(rows), "labels-INITIAL_FORMS": len(found),
    }  # fmt: skip
    for index, row in enumerate(rows):
        values[f"labels-{index}-id"] = found[index].pk if index < len(found) else ""
        values[f"labels-{index}-prompt"] = str(prompt.pk)
        values |= {f"labels-{index}-{name}": value for name, value in row.items()}
    return values


def test_labels_are_moved_and_logged(login: Any, tenant: Tenant) -> None:
    first, second = add(tenant, labels=["production"]), add(tenant, "another")
    other = prompts.add_version(tenant.pk, "other", messages=[{"role": "user", "content": "x"}])[0]
    prompt = Prompt.objects.get(name="greet")
    client = login("*")
    url = page("prompt", prompt.pk)
    moved = {"name": "production", "version": str(second.pk), "share": 0}
    answer = client.post(url, labels_form(prompt, moved))
    assert answer.status_code == 302, text(answer)
    row = PromptLabel.objects.get()
    assert (row.version_id, row.changed_by[:5]) == (second.pk, "user-")
    assert "label" in LogEntry.objects.get().change_message
    wrong = {"name": "production", "version": str(first.pk), "share": 5}
    assert "Only canary has a share." in text(client.post(url, labels_form(prompt, wrong)))
    strange = {"name": "production", "version": str(other.pk), "share": 0}
    assert "not one of the available choices" in text(
        client.post(url, labels_form(prompt, strange))
    )
    assert "greet" in text(client.get(changelist("prompt")))
    assert (
        client.post(reverse("admin:llmtasks_prompt_delete", args=(prompt.pk,))).status_code == 403
    )


# --- feedback -------------------------------------------------------------------------------------


def test_feedback_is_summed_by_prompt_route_and_model(login: Any, tenant: Tenant) -> None:
    for score in (1, 0.5):
        task = ran(tenant, "greet@1")
        make_attempt(task, number=1, error_class="Overloaded", model="m-failed")
        make_attempt(task, number=2)
        rated(task, score)
    rated(make_task(tenant, route="plain"), -1, comment="secret comment", label="off-topic")
    content = squeezed(login("view_feedback", "view_task").get(changelist("feedback")))
    for name, score, bad, number in (
        ("acme/greet@1", "+0.75", 0, 2), ("smart", "+0.75", 0, 2), ("plain", "-1.00", 1, 1),
        ("vendor/m-1", "+0.75", 0, 2),
    ):  # fmt: skip
        assert f">{name}</td><td>{score}</td><td>{bad}</td><td>{number}</td>" in content
    assert "off-topic" in content and "secret comment" not in content
    assert "m-failed" not in content


def test_comments_are_for_whom_may_read_bodies(login: Any, tenant: Tenant) -> None:
    task = make_task(tenant)
    rated(task, 1, comment=f"thanks {EVIL}", label="good")
    url = page("feedback", Feedback.objects.get().pk)
    assert "thanks" not in text(login("view_feedback").get(url))
    content = text(login("view_feedback", "view_bodies").get(url))
    assert "thanks &lt;script&gt;" in content and EVIL not in content
    shown = text(login("view_task").get(page("task", task.pk)))
    assert "+1.00 good" in shown and "thanks" not in shown
    assert login("*").post(url, {"score": 0}).status_code == 403


def test_a_task_leads_to_its_prompt(login: Any, tenant: Tenant) -> None:
    version = add(tenant)
    task = ran(tenant, "greet@1")
    assert page("promptversion", version.pk) in text(login("*").get(page("task", task.pk)))
    gone = ran(tenant, "gone@7")
    assert "gone@7" in text(login("*").get(page("task", gone.pk)))
