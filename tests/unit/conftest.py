"""A vendor over HTTP, and over TLS."""

import ssl
from pathlib import Path

import pytest

from providers import http
from providers.sandbox import Sandbox

TLS = Path(__file__).parent / "fixtures" / "tls"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as server:
        yield server
    http.close_idle()


@pytest.fixture
def no_idle_connections():
    yield
    http.close_idle()


@pytest.fixture
def tls_sandbox(monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
    with Sandbox(tls=context) as server:
        yield server
