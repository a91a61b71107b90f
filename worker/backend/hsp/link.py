"""One MQTT connection: what arrives is handled in order and acknowledged by who handled it, when it has.

aiomqtt connects, subscribes and reads; around it is done what it doesn't do, each for something that was lost without:

- its message iterator loses what is in it when it is cancelled: messages come through its public queue hook, to a pump
  that is never cancelled between taking a message and handling it;
- a cancelled or timed-out connect leaves a live connection behind: it is awaited and closed beside;
- it tells neither a refused publish nor a kept session, and a lost connection leaves publishes waiting: paho's callbacks
  do, at QoS 2 with some help (`client`);
- messages are acknowledged when handled, at QoS 2 as well (`client`);
- it registers readers and writers a turn of the loop late, by number, when the socket may be another one's, and on uvloop
  never hears that a connection was reset: `readiness` does that;
- closing with unread bytes resets the connection, and the broker may never see the DISCONNECT: what still comes is read.

Rejected: a client of our own (its own bugs), and aiomqtt 3 (MQTT 5 only, a pre-release).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from segue.worker.backend.hsp.client import (
    Arrived,
    Will,
    build,
    delay_acknowledgements,
    properties_of,
    tell_refusals,
)
from segue.worker.backend.hsp.errors import LinkError, RefusedError
from segue.worker.backend.hsp.readiness import Readiness
from segue.worker.backend.hsp.settings import HSPSettings

T = TypeVar("T")
Message = aiomqtt.Message
Receive = Callable[[Message], Awaitable[None]]

_log = logging.getLogger("segue.hsp")

_SLICE_S = 0.005
"""How long messages are handled before everything else on the loop gets its turn."""
_CLOSE_S = 2.0
_abandoned: dict[str, set[asyncio.Task[None]]] = {}
"""Connections that nobody waits for any more, on their way out, by client id."""
_FAILED = 0x80
_FRESH_SEND = 1
"""MQTT 5: retained messages are sent for a subscription that is new, not for one that was there before."""


class Link:
    """A connection, for one use: once lost or closed, a new one is made."""

    def __init__(
        self,
        settings: HSPSettings,
        client_id: str,
        receive: Receive,
        *,
        durable: bool = False,
        will: Will | None = None,
    ) -> None:
        """`receive` is awaited with one message after the other. `durable`: the broker keeps its session."""
        self.client_id = client_id
        self.lost = asyncio.Event()
        """Set once the connection is no more, for whatever reason."""
        self.reason = "it was closed"
        self._settings = settings
        self._receive = receive
        self._durable = durable
        self._will = will
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._client: aiomqtt.Client | None = None
        """Once it is connected."""
        self._building: aiomqtt.Client | None = None
        self._paho: paho.Client | None = None
        self._readiness = Readiness(self._loop, self._read, self._write)
        self._pump: asyncio.Task[None] | None = None
        self._inbox = Arrived()
        self._published: dict[int, asyncio.Future[None]] = {}
        self._present = False
        self._send_pubrec: Callable[[int], Any] | None = None

    @property
    def alive(self) -> bool:
        """Whether it is connected, as far as is known."""
        return self._client is not None and not self.lost.is_set()

    # ------------------------------------------------------------------------------------------------- connecting

    async def open(self) -> bool:
        """Connect; whether the broker had kept the session. Raises `LinkError`."""
        late = {each for each in _abandoned.get(self.client_id, ()) if each.get_loop() is self._loop}
        if late:
            await asyncio.wait(late)  # what they do to the session they do before this one has it
        try:
            client = self._build()
        except (OSError, ValueError) as error:
            raise LinkError(
                f"broker {self._settings.broker}: the certificates can't be used: {error}"
            ) from None
        for future in (client._connected, client._disconnected):
            future.add_done_callback(_consume)  # why it failed is told otherwise
        opening = asyncio.ensure_future(client.__aenter__())
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await asyncio.shield(opening)
        except (TimeoutError, asyncio.CancelledError) as error:
            self._abandon(client, opening)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise LinkError(
                f"broker {self._settings.broker} did not answer within {self._settings.connect_timeout_s:g} s"
            ) from None
        except aiomqtt.MqttCodeError as error:
            _drop(client)
            raise RefusedError(f"broker {self._settings.broker} refuses the connection: {error}") from None
        except (aiomqtt.MqttError, ValueError) as error:
            _drop(client)
            raise LinkError(f"broker {self._settings.broker}: {error}") from None
        self._connect(client)
        self._pump = asyncio.create_task(self._pump_messages())
        return self._present

    def _connect(self, client: aiomqtt.Client) -> None:
        self._client = client
        client._disconnected.add_done_callback(self._gone)
        if client._client.socket() is None:  # lost before anybody could see it
            self._end("it was lost at once")

    def _abandon(self, client: aiomqtt.Client, opening: asyncio.Future[Any]) -> None:
        """Nobody waits for it any more: should it come to be connected all the same, it leaves, and the session stays."""

        async def leave() -> None:
            try:
                await opening
            except (aiomqtt.MqttError, ValueError, asyncio.CancelledError):
                pass
            else:
                client._disconnected.add_done_callback(self._gone)
                await self._disconnect(client, keep=True)
            _drop(client)

        def left(task: asyncio.Task[None]) -> None:
            theirs.discard(task)
            if not theirs and _abandoned.get(self.client_id) is theirs:
                del _abandoned[self.client_id]

        theirs = _abandoned.setdefault(self.client_id, set())
        leaving = asyncio.create_task(leave())
        theirs.add(leaving)
        leaving.add_done_callback(left)

    def _build(self) -> aiomqtt.Client:
        client = build(self._settings, self.client_id, self._inbox, durable=self._durable, will=self._will)
        self._building, inner = client, client._client
        self._paho = inner
        on_connect = inner.on_connect

        def connected(who: Any, data: Any, flags: Any, code: Any, properties: Any = None) -> None:
            self._present = bool(flags.session_present)
            cast("Any", on_connect)(who, data, flags, code, properties)

        inner.on_connect = connected
        inner.on_publish = self._on_publish
        inner.on_socket_open = self._opened
        inner.on_socket_close = self._closing
        inner.on_socket_register_write = self._register_write
        inner.on_socket_unregister_write = self._unregister_write
        self._send_pubrec = delay_acknowledgements(inner)
        tell_refusals(inner)
        return client

    # ---------------------------------------------------------------------------------------------- paho's callbacks

    def _opened(self, _client: Any, _data: Any, sock: Any) -> None:
        # paho connects in a thread
        self._loop.call_soon_threadsafe(self._watch, sock)

    def _watch(self, sock: Any) -> None:
        self._readiness.watch(sock)
        if self._building is not None:
            self._building._misc_task = self._loop.create_task(self._building._misc_loop())

    def _in_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        if threading.get_ident() == self._thread:
            call(*arguments)
        else:
            self._loop.call_soon_threadsafe(call, *arguments)

    def _register_write(self, _client: Any, _data: Any, _sock: Any) -> None:
        self._in_loop(self._readiness.want_to_write, True)

    def _unregister_write(self, _client: Any, _data: Any, _sock: Any) -> None:
        self._in_loop(self._readiness.want_to_write, False)

    def _closing(self, _client: Any, _data: Any, _sock: Any) -> None:
        self._in_loop(self._unwatch)

    def _unwatch(self) -> None:
        self._readiness.close()
        misc = self._building._misc_task if self._building is not None else None
        if misc is not None and not misc.done():
            misc.cancel()

    def _read(self) -> None:
        inner = cast("Any", self._paho)
        try:
            inner.loop_read()
            # TLS has more than the kernel knows of
            while hasattr(inner._sock, "pending") and inner._sock.pending() > 0:
                inner.loop_read()
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing comes in any more
            self._end(str(error))

    def _write(self) -> None:
        try:
            if self._paho is not None:
                self._paho.loop_write()
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing goes out any more
            self._end(str(error))

    def _on_publish(self, _client: Any, _data: Any, mid: int, code: ReasonCode, _properties: Any) -> None:
        future = self._published.pop(mid, None)
        if future is None or future.done():
            return
        if code.is_failure:
            future.set_exception(RefusedError(f"broker {self._settings.broker} refuses the message: {code}"))
        else:
            future.set_result(None)

    def _gone(self, disconnected: asyncio.Future[None]) -> None:
        error = None if disconnected.cancelled() else disconnected.exception()
        self._end(str(error) if error else self.reason)

    def _end(self, reason: str) -> None:
        if self.lost.is_set():
            return
        self.reason = reason
        self.lost.set()
        self._inbox.wake.set()
        for future in self._published.values():
            if not future.done():
                future.set_exception(self._lost_error())
        self._published.clear()

    def _lost_error(self) -> LinkError:
        return LinkError(f"the connection to broker {self._settings.broker} was lost: {self.reason}")

    # --------------------------------------------------------------------------------------------------- receiving

    async def _pump_messages(self) -> None:
        items, wake = self._inbox.items, self._inbox.wake
        while True:
            begun = time.monotonic()
            while items:
                try:
                    await self._receive(items.popleft())
                except Exception:  # noqa: BLE001 - the next message is handled all the same
                    _log.exception("event=hsp-receive-failed")
                if time.monotonic() - begun > _SLICE_S:
                    await asyncio.sleep(0)
                    begun = time.monotonic()
            if self.lost.is_set():
                return
            wake.clear()
            await wake.wait()

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that a message was dealt with: it won't be delivered again."""
        if self._client is None or self.lost.is_set():
            return
        if message.qos == 1:
            self._client._client.ack(message.mid, 1)
        elif message.qos == 2 and self._send_pubrec is not None:
            self._send_pubrec(message.mid)

    # ---------------------------------------------------------------------------------------------------- speaking

    async def subscribe(self, filters: Sequence[str], qos: int) -> None:
        """Subscribe to all, or raise `RefusedError` with those that the broker doesn't grant; or `LinkError`."""
        client = self._connected()
        topics: Any = [(each, qos) for each in filters]
        if self._settings.v5:
            topics = [
                (each, SubscribeOptions(qos=qos, retainHandling=_retain_handling(each))) for each in filters
            ]
        codes = await self._until_lost(client.subscribe(topics))
        granted = [code if isinstance(code, int) else code.value for code in codes]
        refused = [
            f"{each} ({'refused' if code >= _FAILED else f'only QoS {code}'})"
            for each, code in zip(filters, granted, strict=True)
            if code >= _FAILED or code < qos
        ]
        if refused:
            raise RefusedError(
                f"broker {self._settings.broker} refuses the subscription to {', '.join(refused)}"
            )

    async def unsubscribe(self, filters: Sequence[str]) -> None:
        """Unsubscribe; once it returns, the broker has read all acknowledgements so far. Raises `LinkError`."""
        await self._until_lost(self._connected().unsubscribe(list(filters)))

    async def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> None:
        """Publish, and wait until the broker has it. Raises `LinkError`: then it may have it, or not."""
        try:
            info = self._connected()._client.publish(topic, payload, qos, retain)
        except ValueError as error:
            raise RefusedError(f"{topic}: {error}") from None
        if info.rc != paho.MQTT_ERR_SUCCESS:
            raise LinkError(f"broker {self._settings.broker}: {paho.error_string(info.rc)}")
        future = self._published[info.mid] = self._loop.create_future()
        try:
            await future
        finally:
            self._published.pop(info.mid, None)

    def _connected(self) -> aiomqtt.Client:
        if self._client is None or self.lost.is_set():
            raise self._lost_error()
        return self._client

    async def _until_lost(self, call: Coroutine[Any, Any, T]) -> T:
        asked, lost = asyncio.ensure_future(call), asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait({asked, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise self._lost_error()
            try:
                return asked.result()
            except aiomqtt.MqttError as error:
                raise LinkError(f"broker {self._settings.broker}: {error}") from None
        finally:
            lost.cancel()
            if not asked.cancel():
                _consume(asked)

    # ------------------------------------------------------------------------------------------------------ leaving

    async def close(self, filters: Sequence[str] = (), *, keep: bool = False) -> None:
        """Disconnect, after unsubscribing from `filters`. Of a durable one the session goes, unless `keep`.

        What arrived and wasn't handled is handled first; nothing is raised.
        """
        leaving = asyncio.ensure_future(self._leave(filters, keep))
        await asyncio.shield(leaving)

    async def _leave(self, filters: Sequence[str], keep: bool) -> None:
        if self.alive:
            with contextlib.suppress(LinkError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    # an answer says that the broker has read all before, acknowledgements above all
                    await self.unsubscribe(filters or ["-"])
        gone = False
        if self.alive and self._client is not None:
            await self._disconnect(self._client, keep)
            gone = self._settings.v5  # with 3.1.1 DISCONNECT can't say so
        self._end("it was closed")
        if self._client is not None:
            _drop(self._client)
        if self._pump is not None and self._pump is not asyncio.current_task():
            _, hanging = await asyncio.wait({self._pump}, timeout=self._settings.drain_timeout_s)
            for pump in hanging:  # what it was at isn't acknowledged
                pump.cancel()
        if self._durable and not keep and not gone and self._client is not None:
            with contextlib.suppress(LinkError):
                await self.forget(self._settings, self.client_id)

    async def _disconnect(self, client: aiomqtt.Client, keep: bool) -> None:
        inner = client._client
        sock = cast("Any", inner.socket())
        if sock is None:
            return
        # paho closes its socket with the last byte that it sends; by this one what still comes is read
        listening = socket.socket(fileno=os.dup(sock.fileno()))
        try:
            listening.setblocking(False)
            properties = None
            if self._settings.v5 and self._durable and not keep:
                properties = properties_of(PacketTypes.DISCONNECT, SessionExpiryInterval=0)
            inner.disconnect(properties=properties)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self.lost.wait()
                    while await self._loop.sock_recv(listening, 65_536):
                        pass
        finally:
            listening.close()

    @staticmethod
    async def forget(settings: HSPSettings, client_id: str) -> None:
        """Have the broker drop a session, if it has one of this id. Raises `LinkError`."""

        async def ignore(_: Message) -> None:
            pass

        link = Link(settings, client_id, ignore)
        await link.open()
        await link.close()


def _retain_handling(topic_filter: str) -> int:
    # a shared subscription isn't "new" per member; MQTT 5 never sends retained messages for one
    return 0 if topic_filter.startswith("$share/") else _FRESH_SEND


def _drop(client: aiomqtt.Client) -> None:
    """Close its socket, whatever state it is in."""
    cast("Any", client._client)._sock_close()
    if not client._connected.done():
        client._connected.cancel()


def _consume(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
