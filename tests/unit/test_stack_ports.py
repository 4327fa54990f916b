import socket

import pytest

from project.stack.errors import StackError
from project.stack.owner import check_external
from project.stack.ports import free_port, is_free, require_free


@pytest.fixture
def taken():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_that_is_taken_is_named_with_its_variable(taken):
    assert not is_free(taken)
    with pytest.raises(StackError, match=f"port {taken} is taken.*make up PORT={taken + 10}"):
        require_free({"PORT": taken})


def test_a_free_port_is_found(taken):
    assert free_port(taken, attempts=20) in range(taken + 1, taken + 20)
    with pytest.raises(StackError, match="no free port"):
        free_port(taken, attempts=1)


def test_an_address_that_is_not_ours_is_told():
    with pytest.raises(StackError, match=r"can't listen on"):
        is_free(8000, "192.0.2.1")


def test_servers_that_cannot_be_reached_are_named_by_their_variable():
    check_external("", "")
    with pytest.raises(StackError, match=r"^DATABASE_URL: ") as caught:
        check_external("postgresql://u:hidden@127.0.0.1:1/x", "")
    assert "\n" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    with pytest.raises(StackError, match=r"^REDIS_URL: "):
        check_external("", "redis://:hidden@127.0.0.1:1/0")
    with pytest.raises(StackError, match=r"^REDIS_URL: "):
        check_external("", "nonsense")
