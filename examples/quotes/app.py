"""Two services, one requiring the other, swapped while streams run on them.

segue serve examples.quotes.app:app --workers 2
curl -N http://127.0.0.1:8000/quotes/tea
segue reload prices --set currency=USD --set per_euro=1.1
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

import segue

services = segue.Services()


class PriceSettings(msgspec.Struct, frozen=True):
    """What can be set: ``[services.prices]`` in segue.toml, or ``segue reload prices --set KEY=VALUE``."""

    currency: str = "EUR"
    per_euro: float = 1.0


class Prices:
    """A price list in one currency. A real one would keep a connection to whoever knows."""

    def __init__(self, settings: PriceSettings) -> None:
        self.settings = settings
        self._in_euro: dict[str, float] = {}

    async def start(self) -> None:
        """Load; nobody sees this instance before it has."""
        await asyncio.sleep(0)
        self._in_euro = {"tea": 4.0, "coffee": 6.5}

    def health(self) -> bool:
        """Asked before a swap is committed."""
        return self.settings.per_euro > 0

    def metrics(self) -> dict[str, int]:
        """Shown by ``segue status --json``."""
        return {"items": len(self._in_euro)}

    async def close(self) -> None:
        """Called once the last lease has been returned."""
        self._in_euro.clear()

    def of(self, item: str) -> str:
        """Raises KeyError."""
        return f"{self._in_euro[item] * self.settings.per_euro:.2f} {self.settings.currency}"


class Quotes:
    """Says prices in words."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.asked = 0

    def of(self, item: str) -> str:
        """Raises KeyError."""
        self.asked += 1
        return f"{item} costs {self.prices.of(item)}"

    def metrics(self) -> dict[str, int]:
        """Summed over the workers."""
        return {"asked": self.asked}


prices = services.declare("prices", Prices, settings=PriceSettings)
quotes = services.declare("quotes", Quotes, requires=[prices])

app = FastAPI(lifespan=services.lifespan)


@app.get("/quotes/{item}")
async def stream(
    item: str, list_: Annotated[Prices, Depends(prices)], times: int = 20, pause: float = 0.1
) -> StreamingResponse:
    """A stream that ends in the currency in which it began: it holds a lease on the price list."""
    try:
        list_.of(item)
    except KeyError:
        raise HTTPException(404, f"there is no {item}") from None

    async def lines() -> AsyncIterator[str]:
        for _ in range(times):
            yield f"data: {list_.of(item)}\n\n"
            await asyncio.sleep(pause)
        yield "data: end\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


@app.get("/quote/{item}")
async def quote(item: str, quotes_: Annotated[Quotes, Depends(quotes)]) -> dict[str, str]:
    """One sentence."""
    return {"quote": quotes_.of(item)}


@app.post("/orders/{item}", dependencies=[Depends(segue.reject_if_draining)])
async def order(item: str) -> dict[str, str]:
    """New work: rejected or held while an operator drains the service."""
    return {"ordered": item, "price": prices.current.of(item)}
