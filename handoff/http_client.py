"""HTTP/1.1 on control sockets: calls of one process to another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus

import h11

from segue.handoff.http import Response

_READ_BYTES = 64 * 1024


class CallError(Exception):
    """A call got no answer: nobody listens there, the time was up, or what came wasn't HTTP."""


async def call(
    path: str,
    method: str,
    target: str,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> Response:
    """Send one request to the Unix socket at `path` and return the answer, whatever its status.

    Raises `CallError` when there is no answer within `timeout_s` seconds.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return await _exchange(reader, writer, method, target, headers or {}, body)
            finally:
                writer.close()
    except TimeoutError:
        raise CallError(f"{method} {target}: no answer from {path} within {timeout_s:g} s") from None
    except (OSError, h11.RemoteProtocolError) as error:
        raise CallError(f"{method} {target}: {path}: {error}") from error


async def follow(
    path: str, target: str, *, timeout_s: float, headers: Mapping[str, str] | None = None
) -> AsyncIterator[bytes]:
    """The pieces of the answer to a GET of `target`, as they come from the Unix socket at `path`.

    Raises `CallError` when there is none, when it is not 200, when nothing comes for `timeout_s` seconds, and when the
    connection ends before the answer does.
    """
    connection = h11.Connection(h11.CLIENT)
    fields = [("Host", "segue"), ("Connection", "close"), *(headers or {}).items()]
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path)
        writer.write(connection.send(h11.Request(method="GET", target=target, headers=fields)) or b"")
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(timeout_s):
                    connection.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response) and event.status_code != HTTPStatus.OK:
                raise CallError(f"GET {target}: status {event.status_code}")
            elif isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                return
    except TimeoutError:
        raise CallError(f"GET {target}: nothing from {path} within {timeout_s:g} s") from None
    except (OSError, h11.RemoteProtocolError) as error:
        raise CallError(f"GET {target}: {path}: {error}") from error
    finally:
        if writer is not None:
            writer.close()


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes,
) -> Response:
    connection = h11.Connection(h11.CLIENT)
    head = h11.Request(
        method=method,
        target=target,
        headers=[
            ("Host", "segue"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *headers.items(),
        ],
    )
    writer.write(connection.send(head) or b"")
    if body:
        writer.write(connection.send(h11.Data(data=body)) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    response: h11.Response | None = None
    answer = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            answer += event.data
        elif isinstance(event, h11.EndOfMessage) and response is not None:
            break
        elif not isinstance(event, h11.InformationalResponse):
            raise h11.RemoteProtocolError("the connection was closed before the answer")
    fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
    return Response(
        response.status_code, bytes(answer), fields.get("content-type", ""), tuple(fields.items())
    )
