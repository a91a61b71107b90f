"""What services answer over HTTP, the same on a worker's private socket and on a router of the application's own."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import msgspec

from segue.handoff.http import Response, json_response, problem
from segue.handoff.messages import SwapOrder
from segue.worker.services.errors import (
    BusyError,
    OptionsError,
    SwapRefusedError,
    Unknown,
    UnknownServiceError,
)
from segue.worker.services.swap import Swaps

PHASES = ("prepare", "commit", "abort")


async def reload(swaps: Swaps | None, name: str, query: dict[str, str]) -> Response:
    """Swap service `name` in this process alone."""
    return _none(name) if swaps is None else await _explained(swaps.swap(name, query))


async def phase(swaps: Swaps | None, which: str, body: bytes) -> Response:
    """One phase of a swap of which somebody else decides."""
    try:
        order = msgspec.json.decode(body, type=SwapOrder)
    except msgspec.DecodeError as error:
        return problem(400, f"the body isn't a swap order: {error}")
    if swaps is None:  # then there is nothing to be taken back, either
        return _none(order.service) if which != "abort" else json_response({})
    if which == "prepare":
        return await _explained(
            swaps.prepare(order.swap, order.service, order.query, order.version, order.choices)
        )
    if which == "commit":
        return await _explained(swaps.commit(order.swap))
    await swaps.abort(order.swap)
    return json_response({})


def _none(name: str) -> Response:
    return problem(404, f"there is no service {name!r}: this application declares none", known=[])


async def _explained(doing: Awaitable[dict[str, Any]]) -> Response:
    try:
        return json_response(await doing)
    except (UnknownServiceError, Unknown) as error:
        return problem(404, str(error), known=error.known)
    except OptionsError as error:
        return problem(400, str(error))
    except BusyError as error:
        return problem(423, str(error))
    except SwapRefusedError as error:
        return problem(409, str(error))
