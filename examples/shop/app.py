"""A small shop: FastAPI with a lifespan, background tasks, a WebSocket and a stream, made for reloads.

Two things in it are about segue, and both do nothing under another server: the restocking waits for `segue.activated`,
since two generations must not do it at once, and whoever is told for long is told to come again when `segue.draining`
is set, so that a reload need not wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

import segue

log = logging.getLogger("uvicorn.error")

RESTOCK_EVERY_S = 10.0
PRICE_EVERY_S = 1.0
COME_AGAIN = 1012
"""WebSocket close code: the service restarts, connect again."""


class Order(BaseModel):
    """What a customer wants."""

    item: str
    count: int = Field(gt=0, le=100)


class Shop:
    """The goods, in memory: each worker has its own. A real shop has a database."""

    def __init__(self) -> None:
        self.stock = {"tea": 20, "coffee": 20}
        self.receipts = 0
        self.sold = asyncio.Event()

    def sell(self, order: Order) -> None:
        """Take goods from the shelf. Raises `HTTPException`."""
        if order.item not in self.stock:
            raise HTTPException(404, f"there is no {order.item}, only {', '.join(self.stock)}")
        if self.stock[order.item] < order.count:
            raise HTTPException(409, f"only {self.stock[order.item]} of {order.item} are left")
        self.stock[order.item] -= order.count
        self.sold.set()
        self.sold = asyncio.Event()

    async def restock(self) -> None:
        """Fill the shelves, in the generation that serves and in no other."""
        while True:
            await segue.activated.wait()
            self.stock = dict.fromkeys(self.stock, 20)
            log.info("the shelves are full")
            await asyncio.sleep(RESTOCK_EVERY_S)

    async def send_receipt(self, order: Order) -> None:
        """What a customer need not wait for. A worker ends only when this has."""
        await asyncio.sleep(2)
        self.receipts += 1
        log.info("sent the receipt for %d %s", order.count, order.item)


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Open the shop; a failure in here refuses the reload."""
    shop = Shop()
    restocking = asyncio.create_task(shop.restock())
    yield {"shop": shop}
    restocking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await restocking


app = FastAPI(title="shop", lifespan=lifespan)


@app.get("/stock")
async def stock(request: Request) -> dict[str, int]:
    """What there is."""
    shop: Shop = request.state.shop
    return shop.stock


@app.post("/orders", status_code=201)
async def order(order: Order, request: Request, background: BackgroundTasks) -> dict[str, Any]:
    """Buy; the receipt is sent afterwards."""
    shop: Shop = request.state.shop
    shop.sell(order)
    background.add_task(shop.send_receipt, order)
    return {"bought": order, "left": shop.stock[order.item]}


@app.get("/prices")
async def prices() -> StreamingResponse:
    """Prices as server-sent events, until this worker is draining: then the browser connects again, to the next."""

    async def events() -> AsyncIterator[str]:
        price = 100
        while not segue.draining:
            price += 1
            yield f"data: tea {price / 100:.2f}\n\n"
            await _either(segue.draining.wait(), asyncio.sleep(PRICE_EVERY_S))
        yield "event: again\ndata: done\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.websocket("/stock/live")
async def live(websocket: WebSocket) -> None:
    """Tell the stock after each sale, until this worker is draining."""
    shop: Shop = websocket.state.shop
    await websocket.accept()
    try:
        while not segue.draining:
            await websocket.send_json(shop.stock)
            await _either(segue.draining.wait(), shop.sold.wait(), websocket.receive())
        await websocket.close(COME_AGAIN, "the shop is being renewed: connect again")
    except (WebSocketDisconnect, RuntimeError):
        pass  # the customer has left


async def _either(*awaitables: Any) -> None:
    """Return when the first of them is done, and end the others."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
