"""Workers are replaced by requests, memory and age: start-first, one at a time, and no client notices."""

from __future__ import annotations

import re
from typing import Any

import pytest
from scenario import Client, Load, Segue, supervised

LOAD = ("--keepalive", "20", "--post", "5", "--newconn", "4", "--sse", "2")
LIMITS = {
    "requests": ("limit-max-requests", ["--limit-max-requests", "300", "--limit-max-requests-jitter", "50"]),
    "age": ("max-worker-age", ["--max-worker-age", "2", "--max-worker-age-jitter", "1"]),
    "memory": ("max-worker-rss", ["--max-worker-rss", "160M", "--max-worker-rss-jitter", "4M"]),
}
LEAK = "hoard = []\n"


def serving(document: dict[str, Any]) -> int:
    current = next(g for g in document["generations"] if g["current"])
    return sum(worker["state"] in {"active", "hung"} for worker in current["workers"])


def replaced(master: Segue) -> list[tuple[str, int]]:
    """What the log says of replacements, in its order: a worker is to be replaced, one serves, one leaves."""
    found = re.findall(
        r"(worker-replaced|worker-active|worker-ended) generation=1 worker=(\d+)", master.output.text
    )
    return [(event, int(number)) for event, number in found]


@pytest.mark.parametrize("kind", LIMITS)
def test_workers_are_replaced_under_load_and_nothing_is_lost(application, kind) -> None:
    why, flags = LIMITS[kind]
    code = application("1")
    if kind == "memory":  # a leak of 2 MB a request of one kind
        text = (code / "shop.py").read_text()
        code = application(
            code=LEAK
            + text.replace(
                'elif scope["path"] == "/work":',
                'elif scope["path"] == "/work":\n        hoard.append(b"x" * 2_000_000)',
            )
        )
    with supervised("shop:app", "--workers", "2", "--no-access-log", *flags, cwd=code) as master:
        first = set(master.worker_pids())
        counts: list[int] = []
        with Load(master.port, *LOAD) as load:

            def both_replaced(document: dict[str, Any]) -> bool:
                counts.append(serving(document))
                return len(re.findall(rf"worker-replaced .*{why}", master.output.text)) >= 2

            master.wait_status(both_replaced)
            master.output.wait_for("worker-ended generation=1 ", count=2)
            load.nothing_lost()
        assert first != set(master.worker_pids())
        assert min(counts) >= 2  # start-first
        underway = 0
        for event, _ in replaced(master):
            underway += {"worker-replaced": 1, "worker-active": -1, "worker-ended": 0}[event]
            assert 0 <= underway <= 1  # one at a time
        master.stop()


def test_one_worker_alone_is_replaced_start_first_and_its_connection_lives_on(application) -> None:
    with (
        supervised("shop:app", "--limit-max-requests", "5", cwd=application("1")) as master,
        Client(master.port) as client,
    ):
        pids: set[str] = set()
        while len(pids) < 3:
            pids.add(client.get("/")[1]["x-pid"])
        master.stop()


def test_each_worker_draws_its_own_limit(application) -> None:
    """With jitter, workers that were started together don't come to their age together."""
    flags = ("--max-worker-age", "1", "--max-worker-age-jitter", "10")
    with supervised("shop:app", "--workers", "6", *flags, cwd=application("1")) as master:
        # all six, whose ages are told in whole seconds: that they are the same by chance happens once in 100,000 times
        found = master.output.wait_for(r"worker-replaced .*worker=[1-6] .*it has run for (\d+) s", count=6)
        ages = [int(re.search(r"for (\d+) s", each)[1]) for each in found]  # type: ignore[index]
        assert len(set(ages)) > 1
        master.stop()
