"""The tables: who asks (tenancy), what is configured (config), what may be used (limits), work
its steps and stored workflows, money, prompts and feedback."""

from llmtasks.models.config import Config, Provider, ProviderModel, Route, RouteCandidate
from llmtasks.models.flows import Workflow, WorkflowVersion
from llmtasks.models.limits import WINDOWS, Limit, ProviderEvent
from llmtasks.models.money import Adjustment, Attempt, CostState, Price
from llmtasks.models.prompts import Feedback, Prompt, PromptLabel, PromptVersion
from llmtasks.models.steps import Step
from llmtasks.models.tenancy import ApiKey, Scope, Tenant
from llmtasks.models.tools import HttpTool, McpServer, McpTool
from llmtasks.models.webhooks import Delivery
from llmtasks.models.work import (
    FINAL,
    IdempotencyKey,
    Kind,
    Lane,
    Mode,
    OnUnknown,
    Status,
    Task,
    TaskPayload,
    Worker,
)

__all__ = [
    "FINAL",
    "WINDOWS",
    "Adjustment",
    "ApiKey",
    "Attempt",
    "Config",
    "CostState",
    "Delivery",
    "Feedback",
    "HttpTool",
    "IdempotencyKey",
    "Kind",
    "Lane",
    "Limit",
    "McpServer",
    "McpTool",
    "Mode",
    "OnUnknown",
    "Price",
    "Prompt",
    "PromptLabel",
    "PromptVersion",
    "Provider",
    "ProviderEvent",
    "ProviderModel",
    "Route",
    "RouteCandidate",
    "Scope",
    "Status",
    "Step",
    "Task",
    "TaskPayload",
    "Tenant",
    "Worker",
    "Workflow",
    "WorkflowVersion",
]
