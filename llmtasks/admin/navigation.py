"""The sidebar."""

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest
from django.urls import reverse

# Group → its tables: model, title, icon.
GROUPS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Work",
        (
            ("llmtasks.task", "Tasks", "assignment"),
            ("llmtasks.attempt", "Attempts", "receipt_long"),
            ("llmtasks.worker", "Workers", "memory"),
            ("llmtasks.delivery", "Webhooks", "webhook"),
        ),
    ),
    (
        "Prompts",
        (
            ("llmtasks.prompt", "Prompts", "description"),
            ("llmtasks.promptversion", "Versions", "history"),
            ("llmtasks.feedback", "Feedback", "thumbs_up_down"),
        ),
    ),
    (
        "Workflows",
        (
            ("llmtasks.workflow", "Workflows", "account_tree"),
            ("llmtasks.workflowversion", "Versions", "history"),
        ),
    ),
    (
        "Configuration",
        (
            ("llmtasks.provider", "Providers", "hub"),
            ("llmtasks.route", "Routes", "alt_route"),
            ("llmtasks.httptool", "HTTP tools", "api"),
            ("llmtasks.mcpserver", "MCP servers", "electrical_services"),
            ("llmtasks.mcptool", "MCP tools", "handyman"),
            ("llmtasks.limit", "Limits", "speed"),
            ("llmtasks.providerevent", "Provider health", "ecg_heart"),
        ),
    ),
    (
        "Money",
        (
            ("llmtasks.price", "Prices", "sell"),
            ("llmtasks.adjustment", "Adjustments", "balance"),
        ),
    ),
    (
        "Access",
        (
            ("llmtasks.tenant", "Tenants", "apartment"),
            ("llmtasks.apikey", "API keys", "key"),
            ("auth.user", "Users", "person"),
            ("auth.group", "Groups", "group"),
        ),
    ),
)

# Whose readers find something on the page of queues and limits.
BOARD = ("llmtasks.task", "llmtasks.limit", "llmtasks.provider", "llmtasks.providerevent")


def navigation(request: HttpRequest) -> list[dict[str, Any]]:
    """Unfold's groups: what the user may not see is left out."""
    start = {"title": "Overview", "icon": "monitoring", "link": reverse("admin:index")}
    board = {
        "title": "Queues and limits",
        "icon": "bar_chart",
        "link": reverse("queues"),
        "permission": may_see_any(BOARD),
    }
    groups = [{"items": [start, board]}]
    for title, tables in GROUPS:
        items = [item(*table) for table in tables]
        groups.append({"title": title, "separator": True, "items": items})  # type: ignore[dict-item]
    return groups


def item(model: str, title: str, icon: str) -> dict[str, Any]:
    return {
        "title": title,
        "icon": icon,
        "link": reverse(f"admin:{model.replace('.', '_')}_changelist"),
        "permission": may_see(model),
    }


def may_see_any(models: tuple[str, ...]) -> Callable[[HttpRequest], bool]:
    return lambda request: any(may_see(model)(request) for model in models)


def may_see(model: str) -> Callable[[HttpRequest], bool]:
    app, _, name = model.partition(".")
    wanted = [f"{app}.{verb}_{name}" for verb in ("view", "change", "add")]
    return lambda request: any(request.user.has_perm(each) for each in wanted)
