"""The HTTP client that MCP's own client is given: it looks at each address before it connects to
it, and reads no answer that is too large. Only this module knows httpx2, which MCP's is made for.
"""

import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import anyio
import httpcore2
import httpx2

from llmtasks.tools.registry import ToolFault

CONNECT_TIMEOUT_S = 5.0


class Guard(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that `may_reach` lets through: the name is looked up here, once."""

    def __init__(self, may_reach: Callable[[str], bool]) -> None:
        self.may_reach = may_reach
        self.inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ToolFault(f"{host} has no address: {error.strerror}") from None
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        if not all(self.may_reach(address) for address in addresses):
            raise ToolFault(f"{host} is in a network that may not be reached")
        for address in addresses[:-1]:
            try:
                return await self.inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self.inner.connect_tcp(
            addresses[-1], port, timeout, local_address, socket_options
        )


class Capped(httpx2.AsyncByteStream):
    """A body of at most so many bytes; `tell` hears of one that is larger."""

    def __init__(self, stream: Any, limit: int, tell: Callable[[ToolFault], None]) -> None:
        self.stream = stream
        self.limit = limit
        self.tell = tell

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self.stream:
            size += len(chunk)
            if size > self.limit:
                fault = ToolFault(f"the answer is larger than {self.limit} bytes", "BadResult")
                self.tell(fault)
                raise fault
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()


class Transport(httpx2.AsyncBaseTransport):
    """`fault`: what the caller should hear, since MCP's client has words of its own for it."""

    def __init__(self, may_reach: Callable[[str], bool], limit: int) -> None:
        self.limit = limit
        self.fault: ToolFault | None = None
        self.pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(), network_backend=Guard(may_reach)
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        wanted = httpcore2.Request(
            method=request.method,
            url=httpcore2.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        answer = await self.pool.handle_async_request(wanted)
        return httpx2.Response(
            status_code=answer.status,
            headers=answer.headers,
            stream=Capped(answer.stream, self.limit, self.tell),
            extensions=answer.extensions,
        )

    def tell(self, fault: ToolFault) -> None:
        self.fault = fault

    async def aclose(self) -> None:
        await self.pool.aclose()


def client(
    transport: Transport, headers: Mapping[str, str], timeout_s: float
) -> httpx2.AsyncClient:
    """A client that takes no proxy from the environment and keeps no more than a call needs."""
    timeout = httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
    return httpx2.AsyncClient(
        transport=transport, headers=dict(headers), timeout=timeout, trust_env=False
    )
