"""Responses, counted at one point: when they are complete.

uvicorn keeps a response's status nowhere, so its class of a request and its response is replaced, in uvicorn's own module,
by one that notes it, and the callback of a complete response is put into one that counts, in place: the protocols stay
the classes that they are, which is what the proof of `segue.worker.idle` stands on. Only while request metrics are on.

What a request pays is one more call when it begins, one for each message of its response and two at its end, 1 µs together.
Rejected, since measured or wrong: a wrapper around the application (it misses the 500 and 503 that uvicorn answers by
itself, and to know how an application ended costs a coroutine); a callback of its own for each request (a third dearer);
counting when the last message is sent, not when it is out (an answer that fails then would count).
"""

from __future__ import annotations

import functools
import inspect
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Iterator, MutableMapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from segue.handoff.messages import LATENCY_BOUNDS_S

if TYPE_CHECKING:
    from segue.worker.access import AccessLog

Cycle: TypeAlias = Any
"""uvicorn's RequestResponseCycle: one request and its response."""

PRIVATE = ""
"""What stands for the name of a listener where it is the private socket (`segue.worker.probe`)."""
_UNKNOWN = "unknown"
_OWN = "segue.own"
"""In the scope of a request that segue itself answers."""
_CYCLE = "RequestResponseCycle"
_COMPLETE = "on_response_complete"
_UVICORN = "uvicorn.protocols.http."
_LARGEST_CLASS = 9


class Sums(NamedTuple):
    """In lists, since an attribute of an object takes longer to add to."""

    begun: list[int]
    """Requests that were given to the application, or to what answers for it."""
    seconds: list[float]
    """The sum of the times of all responses."""


class Responses:
    """What one worker has answered since its start. Nothing here ever goes back."""

    def __init__(self) -> None:
        self.classes = [0] * (_LARGEST_CLASS + 1)
        """Complete responses by the first digit of their status, without `rejected`."""
        self.rejected = 0
        """5xx that segue itself answered: a drain, a stop, a health path that says no."""
        self.private = 0
        """Complete responses on the private socket, of which nothing else is counted."""
        self.latency = [0] * (len(LATENCY_BOUNDS_S) + 1)
        """How many took at most so long (`LATENCY_BOUNDS_S`), each counted once; the last: longer."""
        self.sums = Sums([0], [0.0])
        self.malformed = 0
        """Of the 4xx, those that were no request at all: there was nothing to be timed."""
        self.websockets = 0
        """Connections that became a WebSocket."""
        self.websockets_lost = 0
        """Those of them that are no more."""

    def count_malformed(self) -> None:
        """Something that was no request is answered with 400."""
        self.malformed += 1
        self.classes[4] += 1

    def count_websocket(self) -> None:
        """A connection becomes a WebSocket."""
        self.websockets += 1

    def count_lost_websocket(self) -> None:
        """And is no more."""
        self.websockets_lost += 1

    @property
    def begun(self) -> int:
        """Requests that were given to the application, or to what answers for it."""
        return self.sums.begun[0]

    @property
    def seconds(self) -> float:
        """The sum of the times of all responses."""
        return self.sums.seconds[0]

    @property
    def completed(self) -> int:
        """Requests that were answered."""
        return sum(self.classes) + self.rejected + self.private - self.malformed

    def by_class(self) -> dict[str, int]:
        """`classes` by name, 1xx to 5xx."""
        return {f"{digit}xx": self.classes[digit] for digit in range(1, 6)}


def mark_own(scope: MutableMapping[str, Any]) -> None:
    """Say that what answers this request is segue, not the application.

    The state is shared by the copies that an application's middleware makes of a scope; where there is none, the
    scope itself is marked.
    """
    state = scope.get("state")
    (scope if state is None else state)[_OWN] = True


def _is_own(scope: MutableMapping[str, Any]) -> bool:
    return _OWN in scope or _OWN in (scope.get("state") or ())


def watch(config: Any, responses: Responses, access: AccessLog | None = None) -> bool:
    """Count what connections that are made from now on answer; False if `config`'s protocol doesn't let itself be counted.

    `config` is a loaded ``uvicorn.Config``. Each response is written down in `access`, too.
    """
    protocol, websocket = config.http_protocol_class, config.ws_protocol_class
    found = False
    for module in _modules(protocol):
        cycle = getattr(module, _CYCLE)
        setattr(module, _CYCLE, _noting(getattr(cycle, "segue_counts", cycle), responses, access))
        for cls in vars(module).values():
            if isinstance(cls, type) and _COMPLETE in vars(cls):
                # of a protocol that another one has made: its listener is not known
                cls.segue_listener = getattr(cls, "segue_listener", _UNKNOWN)  # type: ignore[attr-defined]
                _wrap(cls, _COMPLETE, functools.partial(_counting, responses, access))
                _wrap(cls, "send_400_response", functools.partial(_before, responses.count_malformed))
                found = True
    _wrap(websocket, "connection_made", functools.partial(_before, responses.count_websocket))
    _wrap(websocket, "connection_lost", functools.partial(_before, responses.count_lost_websocket))
    return found


def _modules(protocol_class: type) -> Iterator[Any]:
    """Those in which protocols look their cycle up: of the class, of its bases, and what uvicorn has to choose from."""
    names = dict.fromkeys(base.__module__ for base in protocol_class.__mro__)
    if protocol_class.__module__.startswith(_UVICORN):
        names |= dict.fromkeys(name for name in sys.modules if name.startswith(_UVICORN))
    for name in names:
        if hasattr(sys.modules[name], _CYCLE):
            yield sys.modules[name]


def _noting(cycle_class: type[Cycle], responses: Responses, access: AccessLog | None) -> type[Cycle]:
    """A subclass of uvicorn's class that notes what is known only while a request is answered."""
    run_asgi, send = cycle_class.run_asgi, cycle_class.send
    begun, clock = responses.sums.begun, time.perf_counter

    def begin(self: Cycle, app: Any) -> Coroutine[Any, Any, None]:
        begun[0] += 1
        self.segue_begun = clock()
        return run_asgi(self, app)  # type: ignore[no-any-return]

    def note(self: Cycle, message: Any) -> Coroutine[Any, Any, None]:
        if "status" in message:
            self.segue_status = message["status"]
        return send(self, message)  # type: ignore[no-any-return]

    def note_size(self: Cycle, message: Any) -> Coroutine[Any, Any, None]:
        if not self.disconnected:
            self.segue_size += len(message.get("body", b""))
        return note(self, message)

    members = {"run_asgi": begin, "send": note, "segue_status": 0, "segue_counts": cycle_class}
    if access is not None:
        run_asgi = _to_its_end(run_asgi, access)
        members |= {"send": note_size, "segue_size": 0}
    return type(cycle_class.__name__, (cycle_class,), members | {"__module__": cycle_class.__module__})


def _to_its_end(run_asgi: Callable[..., Any], access: AccessLog) -> Callable[..., Coroutine[Any, Any, None]]:
    """A `run_asgi` after which also a response that was broken off is written down."""

    async def run(self: Cycle, app: Any) -> None:
        try:
            await run_asgi(self, app)
        finally:
            if not self.response_complete:
                seconds = time.perf_counter() - self.segue_begun
                access.write(self.scope, self.segue_status, self.segue_size, seconds, aborted=True)

    return run


def _counting(
    responses: Responses, access: AccessLog | None, complete: Callable[..., None]
) -> Callable[..., None]:
    """A protocol's `on_response_complete` that counts."""
    clock, bounds, first = time.perf_counter, LATENCY_BOUNDS_S, LATENCY_BOUNDS_S[0]
    classes, latency, total = responses.classes, responses.latency, responses.sums.seconds

    def count(protocol: Any, cycle: Cycle) -> None:
        if not protocol.segue_listener:
            responses.private += 1
            return
        seconds = clock() - cycle.segue_begun
        latency[0 if seconds <= first else bisect_left(bounds, seconds)] += 1
        total[0] += seconds
        status = cycle.segue_status
        if status >= 500 and _is_own(cycle.scope):
            responses.rejected += 1
        else:
            classes[status // 100] += 1
        if access is not None:
            access.write(cycle.scope, status, cycle.segue_size, seconds, aborted=False)

    def on_response_complete(self: Any) -> None:
        cycle = self.cycle
        count(self, cycle if cycle.response_complete else _answered(sys._getframe(1)))
        complete(self)

    def on_stream_complete(self: Any, stream: int) -> None:
        cycle = self.cycles.get(stream)
        if cycle is not None and cycle.response_complete:  # it is called also for what has broken off
            count(self, cycle)
        complete(self, stream)

    return on_response_complete if len(inspect.signature(complete).parameters) == 1 else on_stream_complete


def _answered(frame: FrameType | None) -> Cycle:
    """Whose response is complete, where `cycle` of the protocol is one that waits behind it.

    A pipelined request is known to nobody but the method that says so: looking at who calls costs only the few that
    are pipelined, while a note on the protocol costs every request more than all the rest.
    """
    while frame is not None:
        found: Any = frame.f_locals.get("self")
        if hasattr(found, "segue_counts") and found.response_complete:
            return found
        frame = frame.f_back
    raise AssertionError("a response is complete, and nobody has sent it")


def _before(count: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        count()
        return method(*args)

    return counted


def _wrap(cls: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a method of a class into another, in place: the class stays the one that it is."""
    method = getattr(cls, name, None)
    if method is not None:
        method = getattr(method, "segue_counts", method)
        wrapped = functools.wraps(method)(wrap(method))
        wrapped.segue_counts = method  # type: ignore[attr-defined]
        setattr(cls, name, wrapped)
