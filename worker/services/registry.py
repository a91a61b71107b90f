"""`segue.Services`: what an application declares its singletons in, and gets them from.

One registry belongs to one application and is started by its lifespan. Under segue the worker activates and swaps
what is in it; under plain uvicorn it does so itself, and a router offers the same endpoints.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar, final, overload

from segue.worker.services import declaration as declarations
from segue.worker.services import host as hosts
from segue.worker.services.declaration import Declaration, Role, Verb
from segue.worker.services.errors import DeclarationError, not_running
from segue.worker.services.instance import Lease, Slot
from segue.worker.services.lifespan import Wrapped
from segue.worker.services.router import HotRouter
from segue.worker.services.running import Running
from segue.worker.services.swap import Swaps

T = TypeVar("T")
_registries: weakref.WeakSet[Services] = weakref.WeakSet()
"""All of this process: one settings file speaks of the services of each."""
_Asgi = Callable[[Any, Any, Any], Awaitable[None]]


@final
class Service(Generic[T]):
    """One declared service. As a FastAPI dependency (``Depends(service)``) it is a lease for the length of the request."""

    def __init__(self, slot: Slot[T]) -> None:
        self._slot = slot

    @property
    def name(self) -> str:
        """As declared."""
        return self._slot.name

    @property
    def current(self) -> T:
        """The instance of this moment. Raises `NotRunningError` before its start and after its end."""
        instance = self._slot.current
        if instance is None:
            raise not_running(self._slot.name)
        return instance.value

    @property
    def version(self) -> int:
        """1, and one more with each swap. Raises `NotRunningError`."""
        instance = self._slot.current
        if instance is None:
            raise not_running(self._slot.name)
        return instance.version

    def lease(self) -> Lease[T]:
        """``with service.lease() as instance:`` pins the instance for one piece of work."""
        return Lease(self._slot)

    async def __call__(self) -> AsyncIterator[T]:
        """For FastAPI: the instance, on a lease until the response, or its stream, has ended."""
        with self.lease() as instance:
            yield instance

    def __repr__(self) -> str:
        return f"<segue service {self.name!r}>"


class Services:
    """The services of one application."""

    def __init__(self) -> None:
        self._declarations: dict[str, Declaration] = {}
        self._slots: dict[str, Slot[Any]] = {}
        self._running: Running | None = None
        self._swaps: Swaps | None = None
        _registries.add(self)

    # ---------------------------------------------------------------------------------------------- declaring

    @overload
    def declare(
        self,
        name: str,
        factory: Callable[..., Awaitable[T]],
        *,
        requires: Iterable[str | Service[Any]] = (),
        per: Role = "worker",
        settings: type | None = None,
        options: type | None = None,
        verbs: Mapping[str, Verb | None] | None = None,
        title: str | None = None,
        **timeouts: float,
    ) -> Service[T]: ...

    @overload
    def declare(
        self,
        name: str,
        factory: Callable[..., T],
        *,
        requires: Iterable[str | Service[Any]] = (),
        per: Role = "worker",
        settings: type | None = None,
        options: type | None = None,
        verbs: Mapping[str, Verb | None] | None = None,
        title: str | None = None,
        **timeouts: float,
    ) -> Service[T]: ...

    def declare(
        self,
        name: str,
        factory: Callable[..., Any],
        *,
        requires: Iterable[str | Service[Any]] = (),
        per: Role = "worker",
        settings: type | None = None,
        options: type | None = None,
        verbs: Mapping[str, Verb | None] | None = None,
        title: str | None = None,
        **timeouts: float,
    ) -> Service[Any]:
        """Declare a service and return what one gets it from.

        `factory` (sync or async) is called with what it `requires`, by name, and, if it takes arguments of these
        names, with `settings` (an instance of the type given here), `options` (what this one swap was told; at a start
        the defaults, or None if there are not enough) and `previous` (the instance that it replaces, or None). What it returns may have the methods `start`, `activate`,
        `deactivate`, `close`, `health` and `metrics`, sync or async; `verbs` names others, or None for none.
        What is sync runs on the event loop: it must not take long, and no timeout ends it.
        ``per="generation"``: active on one worker of the current generation only.

        Timeouts, in seconds: `start_timeout` 60, `health_timeout` 5, `activate_timeout`, `deactivate_timeout` and
        `close_timeout` 10, `lease_timeout` 600, `handover_timeout` 10.

        Raises `DeclarationError` for a name that is taken or can't be one, and for a circle of requirements.
        """
        if self._running is not None:
            raise DeclarationError(f"service {name!r} is declared after the services have been started")
        if name in self._declarations:
            raise DeclarationError(f"service {name!r} is declared twice")
        unknown = [
            key for key in timeouts if not key.endswith("_timeout") or key not in Declaration.__slots__
        ]
        if unknown:
            raise TypeError(f"declare() takes no argument {', '.join(unknown)}")
        names = [self._name(name, each) for each in ([requires] if isinstance(requires, str) else requires)]
        declared = declarations.declare(
            name,
            factory,
            names,
            per=per,
            settings=settings,
            options=options,
            verbs=dict(verbs or {}),
            title=title,
            **timeouts,
        )
        declarations.order(self._declarations | {name: declared}, complete=False)
        self._declarations[name] = declared
        slot = self._slots[name] = Slot[Any](name)
        return Service(slot)

    def _name(self, of: str, required: str | Service[Any]) -> str:
        if isinstance(required, str):
            return required
        if required._slot is not self._slots.get(required.name):
            raise DeclarationError(f"service {of!r} requires {required.name!r} of another registry")
        return required.name

    def check(self) -> list[str]:
        """The names in the order of their start. Raises `DeclarationError` for a required name that isn't declared."""
        return declarations.order(self._declarations)

    def __getitem__(self, name: str) -> Service[Any]:
        """The service of this name. Raises KeyError with those that there are."""
        if name not in self._slots:
            raise KeyError(f"no service {name!r} is declared; declared: {', '.join(sorted(self._slots))}")
        return Service(self._slots[name])

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    # ----------------------------------------------------------------------------------------------- running

    async def __aenter__(self) -> Services:
        """Start all services, each after what it requires."""
        if self._running is not None:
            raise RuntimeError("these services are running already")
        host = hosts.current()
        elsewhere = {name for each in _registries for name in each._declarations}
        running = Running(self._declarations, self._slots, host, elsewhere)
        swaps = Swaps(running)
        if host.on_start is not None:
            host.on_start(running, swaps)
        self._running, self._swaps = running, swaps
        try:
            await running.start()
            if host.on_start is None:
                await running.activate(lead=True)
        except BaseException:
            await self._end(running, swaps)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Deactivate and close all, each before what it requires. Not before then they may be started again."""
        if self._running is not None and self._swaps is not None:
            await self._end(self._running, self._swaps)

    async def _end(self, running: Running, swaps: Swaps) -> None:
        try:
            await running.finish(_close(running, swaps))
        finally:
            self._running = self._swaps = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """For ``FastAPI(lifespan=services.lifespan)`` and Starlette."""
        del app
        async with self:
            yield

    def wrap(self, app: _Asgi) -> _Asgi:
        """For plain ASGI: `app` with the services running from before its start-up until after its shutdown."""
        return Wrapped(self, app)

    def router(self, *, token: str | None = None, allow_unauthenticated: bool = False) -> _Asgi:
        """The hot endpoints as an ASGI application: ``app.mount("/api/v1/hot", services.router(token=...))``.

        Raises ValueError without a token, unless `allow_unauthenticated`.
        """
        return HotRouter(self, token, allow_unauthenticated)

    async def reload(self, name: str, /, **query: str) -> dict[str, Any]:
        """Swap a service in this process and return the report; under segue use ``segue reload NAME`` instead.

        Raises what refuses it: `UnknownServiceError`, `OptionsError`, `Unknown`, `BusyError`, `SwapRefusedError`.
        """
        if self._swaps is None:
            raise not_running(name)
        return await self._swaps.swap(name, query)

    @property
    def running(self) -> tuple[Running, Swaps] | None:
        """For segue itself."""
        return None if self._running is None or self._swaps is None else (self._running, self._swaps)


async def _close(running: Running, swaps: Swaps) -> None:
    await swaps.close()
    await running.close()
