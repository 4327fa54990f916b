"""How values look in lists and on pages."""

from datetime import datetime, timedelta
from decimal import Decimal
from uuid import UUID

from django.template.loader import render_to_string
from django.urls import NoReverseMatch, reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from llmtasks.models import Attempt, CostState

NOTHING = "–"  # noqa: RUF001 - a dash, as it is meant

LABELS = {
    "waiting": "",
    "queued": "info",
    "running": "primary",
    "blocked": "warning",
    "succeeded": "success",
    "failed": "danger",
    "cancelled": "",
    "expired": "warning",
    "sent": "primary",
    "unknown": "warning",
    "settled": "success",
    "done": "success",
    "approved": "info",
    "waits for tasks": "info",
    "waits for a person": "warning",
    "interrupted": "warning",
    "alive": "success",
    "on": "success",
    "off": "",
    "new": "warning",
    "pending": "info",
    "dropped": "",
    "changed": "danger",
    "gone": "",
    "paused": "warning",
    "usable": "success",
    "revoked": "danger",
    "tenant is off": "warning",
    "yes": "success",
    "no": "danger",
    "manual": "info",
    "ok": "success",
    "degraded": "warning",
    "refused": "danger",
    "closed": "success",
    "half open": "warning",
    "open": "danger",
    "breaker opened": "danger",
    "breaker probes": "warning",
    "breaker closed": "success",
    "credential refused": "danger",
    "credential in use again": "success",
}


def short(id_: UUID | None) -> str:
    """Enough of an id to tell it by: its end is random, its start is a time."""
    return f"…{str(id_)[-8:]}" if id_ else NOTHING


def moment(time: datetime | None) -> SafeString | str:
    if time is None:
        return NOTHING
    return format_html('<time class="lt-number">{}</time>', f"{time:%Y-%m-%d %H:%M:%S}")


def money(amount: Decimal | None, state: str) -> SafeString | str:
    """Dollars, and how sure they are. What is not priced is never shown as 0."""
    if state == CostState.UNPRICED:
        known = "" if amount is None else f"{dollars(amount)} + "
        return format_html('<span class="lt-unpriced">{}unpriced</span>', known)
    if amount is None:
        return NOTHING
    if state == CostState.ESTIMATED:
        return format_html(
            '<span class="lt-estimated">≈ {} <small>estimated</small></span>', dollars(amount)
        )
    return format_html('<span class="lt-number">{}</span>', dollars(amount))


def dollars(amount: Decimal) -> str:
    """Exact, without the zeros at the end beyond cents."""
    text = f"{amount:,.10f}".rstrip("0")
    whole, _, places = text.partition(".")
    return f"${whole}.{places:0<2}".replace("$-", "-$")


def tokens(given: int, made: int) -> SafeString | str:
    if not given and not made:
        return NOTHING
    return format_html('<span class="lt-number">{} / {}</span>', f"{given:,}", f"{made:,}")


def attempt_tokens(row: Attempt) -> SafeString | str:
    written = row.cache_write_5m_tokens + row.cache_write_1h_tokens
    given = row.input_tokens + row.cached_input_tokens + written
    return tokens(given, row.output_tokens + row.reasoning_tokens)


def result(row: Attempt) -> str:
    """The status and the error of a call."""
    parts = (str(row.http_status or ""), row.error_class)
    return " ".join(part for part in parts if part) or NOTHING


def label(state: str) -> SafeString:
    """A coloured label, as Unfold's lists have them."""
    context = {"type": LABELS.get(state, ""), "text": state}
    return SafeString(render_to_string("unfold/helpers/label.html", context))


def brief(time: datetime) -> SafeString:
    """For lists: the year is in the tip, with the rest."""
    return format_html(
        '<time class="lt-number" title="{}">{}</time>',
        f"{time:%Y-%m-%d %H:%M:%S.%f} UTC",
        f"{time:%m-%d %H:%M:%S}",
    )


def span(start: datetime | None, end: datetime | None) -> str:
    if start is None:
        return NOTHING
    return duration((end or timezone.now()) - start)


def duration(length: timedelta) -> str:
    seconds = max(length.total_seconds(), 0.0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def milliseconds(number: int | None) -> str:
    return NOTHING if number is None else duration(timedelta(milliseconds=number))


def number(amount: int, unit: str = "") -> SafeString:
    return format_html('<span class="lt-number">{}</span> {}', f"{amount:,}", unit)


def bar(share: float, text: str) -> SafeString:
    """A bar that is full at 1, and what it says."""
    level = "lt-full" if share > 0.9 else "lt-high" if share > 0.7 else ""
    return format_html(
        '<div class="lt-use"><div class="lt-progress {}"><div style="width: {}%"></div></div>'
        "<span>{}</span></div>",
        level,
        f"{100 * min(share, 1.0):.1f}",
        text,
    )


def link(model: str, pk: object, text: str) -> SafeString | str:
    """A link to a row's page."""
    try:
        url = reverse(f"admin:llmtasks_{model}_change", args=(pk,))
    except NoReverseMatch:
        return text
    return format_html('<a class="lt-link" href="{}">{}</a>', url, text)


def list_link(model: str, query: str, text: str) -> SafeString:
    """A link to a filtered list."""
    url = reverse(f"admin:llmtasks_{model}_changelist")
    return format_html('<a class="lt-link" href="{}?{}">{}</a>', url, query, text)
