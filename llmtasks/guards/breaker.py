"""The breaker's history. Its state is in Redis, one for each provider and model (`rate_limit.lua`).

It opens where half of at least 20 calls in 30 s failed by the vendor's fault, lets up to three
probes through after its cool-down (10 s, doubled up to two minutes while they fail), and closes
after two that passed.
"""

import logging

from django.db import Error

from llmtasks.models import ProviderEvent

log = logging.getLogger(__name__)


def record(provider: str, model: str, event: str, detail: str = "") -> None:
    """Write a change of state down. Never raises: the change itself is in force already."""
    log.warning(
        "breaker", extra={"provider": provider, "model": model, "event": event, "detail": detail}
    )
    try:
        ProviderEvent.objects.create(provider=provider, model=model, event=event, detail=detail)
    except Error:
        log.exception("a breaker's change can't be written down")
