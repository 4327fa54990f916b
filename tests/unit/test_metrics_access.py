"""Who may read /metrics."""

import pytest
from django.test import RequestFactory

from llmtasks.api.metrics import check_access
from llmtasks.errors import NotAllowed, NotAuthenticated

TOKEN = "0123456789abcdef"


def request(**meta: str):
    return RequestFactory().get("/metrics", **meta)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.0.9", "::1"])
def test_without_a_token_this_machine_may(address, settings):
    settings.METRICS_TOKEN = ""
    check_access(request(REMOTE_ADDR=address))


@pytest.mark.parametrize(
    "meta",
    [
        {"REMOTE_ADDR": "10.0.0.1"},
        {"REMOTE_ADDR": "2001:db8::1"},
        # A Unix socket: there is a proxy before it.
        {"REMOTE_ADDR": ""},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "127.0.0.1"},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_PROTO": "https"},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_FORWARDED": "for=1.2.3.4"},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_REAL_IP": "1.2.3.4"},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_VIA": "1.1 proxy"},
        {"REMOTE_ADDR": "10.0.0.1", "HTTP_AUTHORIZATION": "Bearer "},
    ],
)
def test_without_a_token_nobody_else_may(meta, settings):
    settings.METRICS_TOKEN = ""
    with pytest.raises(NotAllowed):
        check_access(request(**meta))


def test_with_a_token_who_sends_it_may(settings):
    settings.METRICS_TOKEN = TOKEN
    for text in (f"Bearer {TOKEN}", f"bearer  {TOKEN} "):
        check_access(request(REMOTE_ADDR="10.0.0.1", HTTP_AUTHORIZATION=text))


@pytest.mark.parametrize("text", ["", f"Basic {TOKEN}", f"Bearer {TOKEN}0", "Bearer", "Bearer ü"])
def test_with_a_token_nobody_else_may_not_even_from_here(text, settings):
    settings.METRICS_TOKEN = TOKEN
    with pytest.raises(NotAuthenticated):
        check_access(request(REMOTE_ADDR="127.0.0.1", HTTP_AUTHORIZATION=text))
