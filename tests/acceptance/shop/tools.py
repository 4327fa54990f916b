"""What an agent of the shop may do."""

import time

from llmtasks.tools.registry import tool


@tool(idempotent=True, timeout_s=10)
def find_order(number: int) -> str:
    """Look an order up."""
    time.sleep(0.2)
    return f"order {number} was sent"


@tool(critical=False, idempotent=True)
def send_mail(to: str) -> str:
    """Send a mail."""
    return f"sent to {to}"


@tool(needs_approval=True)
def refund(cents: int) -> str:
    """Give money back."""
    return f"{cents} cents are on their way"
