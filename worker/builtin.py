"""The application that is served when none is named: it shows what serves it, and goes on showing it over a reload."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import segue

_EVENT_EVERY_S = 1.0

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>segue</title>
<style>
 :root{color-scheme:light dark}
 body{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:12vh auto;padding:0 1rem}
 h1{font-weight:600;margin:0} p{margin:.3rem 0 1.5rem;opacity:.75}
 dl{display:grid;grid-template-columns:max-content 1fr;gap:.4rem 1.5rem;margin:0}
 dt{opacity:.65} dd{margin:0;font-variant-numeric:tabular-nums} code{font-size:.95em}
</style>
<h1>segue</h1><p>It serves. Run <code>segue reload</code> and watch the generation change; nothing is lost.</p>
<dl><dt>generation</dt><dd id="generation"></dd><dt>worker</dt><dd id="worker"></dd><dt>process</dt><dd id="pid"></dd>
<dt>version</dt><dd id="version"></dd><dt>asked</dt><dd id="asked">0</dd><dt>failed</dt><dd id="failed">0</dd></dl>
<script>
 let asked=0,failed=0;const put=(k,v)=>{document.getElementById(k).textContent=v};
 async function ask(){
  try{const r=await fetch("served-by");const d=await r.json();for(const k in d)put(k,d[k])}catch{failed++}
  put("asked",++asked);put("failed",failed);setTimeout(ask,1000)}
 ask();
</script></html>
"""


def _served_by(request: Request) -> dict[str, int | str]:
    info: segue.WorkerInfo | None = getattr(request.state, "segue", None)
    return {
        "generation": info.generation if info else 0,
        "worker": info.worker if info else 0,
        "pid": os.getpid(),
        "version": segue.__version__,
    }


async def _page(_: Request) -> Response:
    return HTMLResponse(_PAGE, headers={"Cache-Control": "no-store"})


async def _who(request: Request) -> Response:
    return JSONResponse(_served_by(request), headers={"Cache-Control": "no-store"})


async def _ping(_: Request) -> Response:
    return PlainTextResponse("pong")


async def _events(request: Request) -> Response:
    async def events() -> AsyncIterator[str]:
        while not segue.draining:
            yield f"data: {json.dumps(_served_by(request) | {'time': time.time()})}\n\n"
            try:
                async with asyncio.timeout(_EVENT_EVERY_S):
                    await segue.draining.wait()
            except TimeoutError:
                continue
        # the browser comes back at once, to the generation that serves then
        yield "retry: 100\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


app = Starlette(
    routes=[
        Route("/", _page),
        Route("/served-by", _who),
        Route("/ping", _ping),
        Route("/events", _events),
    ]
)
