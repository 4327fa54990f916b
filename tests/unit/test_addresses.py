"""Which addresses are the public Internet's, and that a connection goes where was looked."""

import socket
from ipaddress import ip_network
from typing import Any

import pytest

from llmtasks.network import may_reach
from providers import addresses, http, sockets
from providers.base import Account
from providers.errors import ConnectionFailed
from providers.http import Exchange
from tests.unit.scripted import Scripted, answer


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111"])
def test_public(address: str) -> None:
    assert addresses.is_public(address) and may_reach(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::", "10.1.2.3", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "100.64.0.1",
        "224.0.0.1", "239.1.1.1", "ff02::1", "240.0.0.1", "255.255.255.255", "192.0.2.1",
        "198.18.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "::7f00:1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2001:db8::1",
        "2001::1", "no address", "",
    ],
)  # fmt: skip
def test_not_public(address: str) -> None:
    assert not addresses.is_public(address) and not may_reach(address)


def test_a_setting_lets_private_networks_in(settings: Any) -> None:
    settings.PRIVATE_NETWORKS = [ip_network("10.1.0.0/16"), ip_network("fd00::/8")]
    assert may_reach("10.1.2.3") and may_reach("::ffff:10.1.2.3") and may_reach("fd00::1")
    assert not may_reach("10.2.0.1") and not may_reach("127.0.0.1") and not may_reach("x")


def guarded(url: str) -> Account:
    return Account(name="t", base_url=url, may_reach=may_reach)


def test_a_private_host_is_refused_before_a_connection() -> None:
    with Scripted(lambda peer, number: None) as server:
        with pytest.raises(ConnectionFailed, match="network that may not be reached"):
            with http.ask(guarded(server.base_url), "GET", "/", None, {}, Exchange()):
                pass
        assert server.connections == 0


def test_a_connection_made_without_a_look_is_not_used(settings: Any) -> None:
    def script(peer: Any, number: int) -> None:
        while peer.read():
            peer.send(answer(b"{}"))

    with Scripted(script) as server:
        plain = Account(name="t", base_url=server.base_url)
        with http.ask(plain, "POST", "/", b"{}", {}, Exchange()) as got:
            assert got.read() == b"{}"
        with pytest.raises(ConnectionFailed):
            with http.ask(guarded(server.base_url), "POST", "/", b"{}", {}, Exchange()):
                pass
        settings.PRIVATE_NETWORKS = [ip_network("127.0.0.0/8")]
        with http.ask(guarded(server.base_url), "POST", "/", b"{}", {}, Exchange()) as got:
            assert got.read() == b"{}"
        assert server.connections == 2
    http.close_idle()


@pytest.mark.parametrize(
    ("found", "tried"),
    [
        (["93.184.216.34"], ["93.184.216.34"]),
        (["127.0.0.1"], []),
        # One private address among public ones is enough.
        (["93.184.216.34", "10.0.0.1"], []),
    ],
)
def test_the_address_that_was_looked_at_is_the_one_that_is_reached(
    monkeypatch: pytest.MonkeyPatch, found: list[str], tried: list[str]
) -> None:
    """A name that changes its mind between look and connection gains nothing: it is asked once."""
    asked: list[str] = []
    reached: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        names = found if len(asked) == 1 else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, port)) for name in names]

    def no_connection(address: Any, *_: Any) -> None:
        reached.append(address[4][0])
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(sockets, "_open", no_connection)
    with pytest.raises(ConnectionFailed):
        with http.ask(guarded("http://rebind.test:9/"), "GET", "/", None, {}, Exchange()):
            pass
    assert (asked, reached) == (["rebind.test"], tried)
