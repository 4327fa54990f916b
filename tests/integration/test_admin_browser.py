"""The admin in a real browser: no other host is asked, no script fails, charts are drawn."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.urls import reverse
from django.utils import timezone
from playwright.sync_api import Page, expect, sync_playwright

from llmtasks import stores
from llmtasks.models import Kind, Lane, Limit, Provider, ProviderEvent, Status, Task
from tests import factories
from tests.admin_pages import make_task, page
from tests.integration.test_admin_prompts import add, ran, rated
from tests.integration.test_admin_runs import make_step, paid
from tests.integration.test_health import call, vendor

__all__ = ["vendor"]

CHROMIUM = shutil.which("chromium")
SLOW_MS = 30_000
ADDED = ("limit", "route", "tenant", "prompt", "promptversion")
# The page itself and the cards on it: whatever is wider inside than outside.
OVERFLOWING = """() => [document.documentElement, ...document.querySelectorAll(".lt-card")]
    .filter(part => part.scrollWidth > part.clientWidth + 1).map(part => part.innerText)"""


@pytest.fixture
def browser(vendor: Provider, live_server: Any, client: Any) -> Iterator[Page]:
    """A page that is logged in, and that says what it asked for and what failed. The test's thread
    must not ask the database while it is open."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("needs chromium")
        pytest.skip("needs chromium")
    client.force_login(User.objects.create_superuser("operator"))
    cookie = {
        "name": "sessionid", "value": client.cookies["sessionid"].value, "url": live_server.url,
    }  # fmt: skip
    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = program.new_context(
            base_url=live_server.url, viewport={"width": 1400, "height": 900}
        )
        context.add_cookies([cookie])  # type: ignore[list-item]
        context.set_default_timeout(SLOW_MS)
        expect.set_options(timeout=SLOW_MS)
        opened = context.new_page()
        opened.faults = []  # type: ignore[attr-defined]
        watch(opened, live_server.url)
        yield opened
        program.close()
    assert not opened.faults, opened.faults  # type: ignore[attr-defined]


def watch(opened: Page, url: str) -> None:
    faults: list[str] = opened.faults  # type: ignore[attr-defined]
    own = (url, "data:")
    opened.on("request", lambda r: r.url.startswith(own) or faults.append(f"asked {r.url}"))
    opened.on("pageerror", lambda error: faults.append(f"script: {error}"))
    opened.on(
        "response",
        lambda r: (
            r.status < 400 or r.url.endswith("/favicon.ico") or faults.append(f"{r.status} {r.url}")
        ),
    )


@pytest.fixture
def busy(vendor: Provider) -> dict[str, int]:
    """Something to draw, and the pages on which it is drawn."""
    tenant = factories.tenant(weight=5)
    for number in range(3):
        make_task(tenant, not_before=timezone.now() - timedelta(minutes=number), lane=Lane.BULK)
    make_task(tenant, status="running", lane=Lane.BULK)
    limit = Limit.objects.create(provider=vendor, unit="requests", window="hour", amount=10)
    call(8, error="Timeout")
    ProviderEvent.objects.create(provider="vendor", model="m", event="opened", detail="Timeout")
    Provider.objects.update(refused_at=timezone.now(), refused_reason="AuthenticationFailed: no")
    return {"provider": vendor.pk, "limit": limit.pk}


def elsewhere(work: Callable[[], Any]) -> Any:
    """In another thread: that of the browser must not ask the database."""

    def run() -> Any:
        try:
            return work()
        finally:
            stores.release()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def widths_of(opened: Page, *selectors: str) -> list[float]:
    """How wide the first of each is drawn, all at one moment: the page changes by itself."""
    script = "all => all.map(s => document.querySelector(s)?.getBoundingClientRect().width ?? 0)"
    found: list[float] = opened.evaluate(script, list(selectors))
    return found


@pytest.mark.django_db(transaction=True)
def test_every_new_page_opens_in_a_browser(busy: dict[str, int], browser: Page) -> None:
    urls = [
        reverse("admin:index"),
        reverse("queues"),
        page("provider", busy["provider"]),
        page("limit", busy["limit"]),
        *(reverse(f"admin:llmtasks_{name}_add") for name in ADDED),
        *(
            reverse(f"admin:llmtasks_{name}_changelist")
            for name in (*ADDED, "providerevent", "provider", "feedback")
        ),
    ]
    for url in urls:
        browser.goto(url)
        assert browser.evaluate(OVERFLOWING) == [], url


@pytest.mark.django_db(transaction=True)
def test_charts_are_drawn_and_follow_by_themselves(busy: dict[str, int], browser: Page) -> None:
    browser.goto(reverse("queues"))
    expect(browser.get_by_text("8 of 10 · 80%")).to_be_visible()
    due, running, used, limit = widths_of(
        browser,
        *(".lt-stack > .lt-due", ".lt-stack > .lt-running"),
        *(".lt-use .lt-progress > div", ".lt-use .lt-progress"),
    )
    assert due == pytest.approx(3 * running, rel=0.05) and running > 20
    assert used == pytest.approx(0.8 * limit, rel=0.02)
    expect(browser.get_by_text("3 waiting · 1 under way").first).to_be_visible()
    elsewhere(lambda: make_task(factories.tenant(), lane=Lane.BULK))
    shown = browser.get_by_text("4 waiting · 1 under way").first
    expect(shown).to_be_visible()


@pytest.mark.django_db(transaction=True)
def test_a_refused_credential_is_used_again_by_a_click(busy: dict[str, int], browser: Page) -> None:
    browser.goto(reverse("admin:index"))
    alert = browser.get_by_role("alert")
    expect(alert).to_contain_text("the vendor refused its credential")
    alert.get_by_role("button", name="Use the credential again").click()
    expect(browser.get_by_text("vendor is used again.")).to_be_visible()
    expect(browser.get_by_role("alert")).to_have_count(0)
    assert elsewhere(lambda: Provider.objects.get().refused_at) is None


@pytest.mark.django_db(transaction=True)
def test_a_wrong_limit_is_told_at_its_field(busy: dict[str, int], browser: Page) -> None:
    browser.goto(reverse("admin:llmtasks_limit_add"))
    browser.locator("[name=unit]").select_option("concurrency")
    browser.locator("[name=window]").select_option("minute")
    browser.locator("[name=amount]").fill("5")
    browser.get_by_role("button", name="Save", exact=True).click()
    expect(browser.get_by_text("Calls at once have no window: empty it.")).to_be_visible()


@pytest.fixture
def run(vendor: Provider) -> Task:
    """A run with another inside, many beside each other, and a call that waits for a person."""
    tenant = factories.tenant()
    task = make_task(tenant, kind=Kind.AGENT, status=Status.BLOCKED)
    make_step(task, 0, "model", name="smart")
    inner = make_task(tenant, kind=Kind.AGENT, parent_id=task.pk, status=Status.SUCCEEDED)
    make_step(task, 1, name="asks", child_id=inner.pk)
    for number in range(40):
        make_step(inner, number, name=f"long-name-{number}" * 3, input={"x": "y" * 500})
    paid(inner, "0.25")
    make_step(task, 2, name="refund@1", status="approval", input={"cents": 900}, took=None)
    return task


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_run_is_drawn_and_decided_on(run: Task, browser: Page, theme: str) -> None:
    browser.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    browser.goto(page("task", run.pk))
    assert browser.evaluate(OVERFLOWING) == []
    turn, call = (browser.locator(".lt-run .lt-node").nth(number) for number in (0, 1))
    expect(call).to_contain_text("$0.25")
    left, right = turn.bounding_box(), call.bounding_box()
    assert left and right and left["x"] + left["width"] < right["x"]
    assert len(set(colours_of(browser, ".lt-run > .lt-wave > .lt-node"))) == 2
    browser.get_by_placeholder("Why").fill("fine")
    browser.get_by_role("button", name="Approve").click()
    expect(browser.get_by_text("Approved step 2, refund@1: the run goes on.")).to_be_visible()
    expect(browser.get_by_role("button", name="Approve")).to_have_count(0)


def colours_of(opened: Page, selector: str) -> list[str]:
    script = "s => [...document.querySelectorAll(s)].map(n => getComputedStyle(n).borderLeftColor)"
    found: list[str] = opened.evaluate(script, selector)
    return found


@pytest.fixture
def versions(vendor: Provider) -> list[str]:
    """Two versions of a prompt that were used, by their ids."""
    tenant = factories.tenant()
    made = [
        add(tenant, f"Be helpful.\n{said}\n" + "long " * 200, note=said, labels=[label])
        for said, label in (("Hello {{ name }}", "production"), ("Hi {{ name }}", "canary"))
    ]
    rated(ran(tenant, "greet@1"), -0.5)
    return [str(version.pk) for version in made] + [str(made[0].prompt_id)]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_versions_are_compared_and_the_next_is_added(
    versions: list[str], browser: Page, theme: str
) -> None:
    browser.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    browser.goto(page("prompt", versions[2]))
    assert browser.evaluate(OVERFLOWING) == []
    differs = browser.locator("tr.lt-differs")
    expect(differs).to_have_count(1)
    expect(differs).to_contain_text("Hello {{ name }}")
    browser.get_by_role("link", name="New version").click()
    browser.locator("[name=note]").fill("the third")
    browser.locator("[name=messages]").fill('[{"role": "user", "content": "{{ 1 }}"}]')
    browser.get_by_role("button", name="Save", exact=True).click()
    expect(browser.get_by_text("names no variable")).to_be_visible()
    browser.locator("[name=messages]").fill('[{"role": "user", "content": "Yo {{ name }}"}]')
    browser.get_by_role("button", name="Save", exact=True).click()
    expect(browser.get_by_text("the third").first).to_be_visible()
    browser.goto(reverse("admin:llmtasks_feedback_changelist"))
    expect(browser.get_by_text("-0.50").first).to_be_visible()
    assert browser.evaluate(OVERFLOWING) == []
