"""What the support agent may do: look an order up at once, send a mail in the background."""

from typing import Annotated, Any

from django.core.mail import EmailMessage, get_connection
from pydantic import Field

from llmtasks.tools.registry import ToolError, tool

ORDERS = {
    "1001": {"status": "shipped", "carrier": "DHL", "arrives": "2026-11-24"},
    "1002": {"status": "packed", "carrier": None, "arrives": None},
}


@tool(idempotent=True, timeout_s=5, retries=1)
def find_order(number: Annotated[str, Field(pattern="^[0-9]{4}$")]) -> dict[str, Any]:
    """Look an order up.

    Args:
        number: four digits, as on the invoice
    """
    if number not in ORDERS:
        raise ToolError(f"there is no order {number}")
    return ORDERS[number]


@tool(critical=False)
def send_mail(to: str, text: str) -> str:
    """Send a mail to the customer. Nobody waits for it.

    Args:
        to: the address
        text: what to tell
    """
    # Into the worker's log; with Django's EMAIL_… settings and no backend named, to a mail server.
    backend = get_connection("django.core.mail.backends.console.EmailBackend")
    EmailMessage("Your order", text, to=[to], connection=backend).send()
    return f"sent to {to}"
