"""The admin: one module per group of tables. Runtime rows are read-only; verbs are actions."""

from django.contrib import admin

from llmtasks.admin import (
    accounts,
    attempts,
    config,
    feedback,
    limits,
    money,
    prompts,
    routes,
    tasks,
    tenancy,
    tools,
    webhooks,
    workers,
    workflows,
)

__all__ = [
    "accounts",
    "attempts",
    "config",
    "feedback",
    "limits",
    "money",
    "prompts",
    "routes",
    "tasks",
    "tenancy",
    "tools",
    "webhooks",
    "workers",
    "workflows",
]

# Unfold's own `admin/index.html` would be found before one of ours.
admin.site.index_template = "admin/llmtasks/start.html"
admin.site.index_title = "Overview"
