"""Services swapped in real workers under a real master: all or nothing, whatever happens in between."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario import HOT, Client, Load, Segue, supervised, unix_call

APP = """
import asyncio, json, os, pathlib, signal
import msgspec
import segue

HERE = pathlib.Path(__file__).parent
services = segue.Services()


class Settings(msgspec.Struct):
    tag: str = "plain"
    key: segue.Secret = segue.Secret("")
    mode: str = "good"


def first(what):
    "Whether no other process has asked this before."
    try:
        os.close(os.open(HERE / what, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Model:
    def __init__(self, settings):
        self.settings = settings
        mode = settings.mode
        if mode == "factory raises":
            raise RuntimeError("no such model")
        if mode == "one factory raises" and first("raised"):
            raise RuntimeError("not here")

    async def start(self):
        mode = self.settings.mode
        if mode == "start hangs":
            await asyncio.Event().wait()
        if mode == "slow start":
            (HERE / f"starting-{os.getpid()}").touch()
            while not (HERE / "go").exists():
                await asyncio.sleep(0.01)
        if mode == "die in prepare" and first("died"):
            os.kill(os.getpid(), signal.SIGKILL)

    def health(self):
        if self.settings.mode == "hung health":
            return asyncio.sleep(3600)
        return self.settings.mode != "unhealthy"

    async def close(self):
        with open(HERE / "closed", "a") as log:
            log.write(f"{self.settings.tag}\\n")


class Dialogue:
    def __init__(self, model):
        self.model = model

    def set_model(self, model):
        mode = model.settings.mode
        if mode == "setter raises" or (mode == "second setter raises" and not first("setter")):
            raise RuntimeError("not this model")
        if mode == "die in first commit" and first("committing"):
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "die in second commit" and not first("committing"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.model = model


model = services.declare("model", Model, settings=Settings, start_timeout=60)
dialogue = services.declare("dialogue", Dialogue, requires=[model], title="Dialogue")


async def serve(scope, receive, send):
    if scope["type"] != "http":
        return
    headers = [(b"x-pid", str(os.getpid()).encode()), (b"x-version", b"1")]
    query = dict(pair.split("=") for pair in scope["query_string"].decode().split("&") if pair)
    if scope["path"] == "/stream":
        with model.lease() as leased:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for _ in range(int(query["n"])):
                said = f"{leased.settings.tag}\\n".encode()
                await send({"type": "http.response.body", "body": said, "more_body": True})
                await asyncio.sleep(float(query["ms"]) / 1000)
            await send({"type": "http.response.body", "body": b"end\\n"})
        return
    if scope["path"] == "/ping":
        body = b"pong"
    else:
        document = {"pid": os.getpid(), "tag": model.current.settings.tag, "wired": dialogue.current.model.settings.tag,
                    "version": model.version, "has_key": bool(model.current.settings.key)}
        body = json.dumps(document).encode()
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


app = services.wrap(serve)
"""


@contextlib.contextmanager
def running(directory: Path, *flags: str, workers: int = 2, code: str = APP) -> Iterator[Segue]:
    directory.chmod(0o755)
    (directory / "chat.py").write_text(code)
    with supervised("chat:app", "--workers", str(workers), *flags, cwd=directory) as master:
        yield master
        master.stop(None)


def seen(master: Segue) -> dict[int, int]:
    """The version that each worker has, by its pid."""
    document = master.wait_status(
        lambda document: all(
            worker["state"] == "active" and worker.get("services") for worker in current(document)["workers"]
        )
    )
    return {worker["pid"]: worker["services"]["model"]["version"] for worker in current(document)["workers"]}


def current(document: dict[str, Any]) -> dict[str, Any]:
    return next(g for g in document["generations"] if g["current"])


def tags(master: Segue, count: int) -> set[str]:
    """What all of `count` workers answer: connections are made until each has been met."""
    met: dict[int, str] = {}
    for _ in range(2000):
        with Client(master.port) as client:
            said = client.json("/")
        assert said["tag"] == said["wired"], "a dependent has another instance than a look-up gives"
        met[said["pid"]] = said["tag"]
        if len(met) == count:
            return set(met.values())
    raise AssertionError(f"met {len(met)} workers of {count}")


def swap(master: Segue, **settings: str) -> tuple[int, dict[str, Any]]:
    query = "&".join(f"{key}={value.replace(' ', '%20')}" for key, value in settings.items())
    return master.call("POST", f"{HOT}/reload/model?{query}")


def test_a_swap_replaces_the_service_in_every_worker_and_names_what_was_rewired(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        code, answer = swap(master, tag="new")
        assert code == 200, answer
        assert (answer["version"], answer["rewired"]) == (2, ["Dialogue"])
        assert len(answer["workers"]) == 2
        for worker in answer["workers"]:
            assert {"build", "start", "probe", "commit", "deactivate", "activate"} <= worker["seconds"].keys()
            assert worker["leases_out"] == 0
        assert tags(master, 2) == {"new"}
        assert set(seen(master).values()) == {2}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("factory raises", "no such model"),
        ("one factory raises", "not here"),
        ("start hangs", "took longer than 1.5 s"),
        ("unhealthy", "not healthy"),
        ("setter raises", "not this model"),
        ("die in prepare", "SIGKILL"),
        ("die in first commit", "SIGKILL"),
    ],
)
def test_a_swap_that_fails_before_the_decision_leaves_the_old_instance_everywhere(
    tmp_path: Path, mode: str, reason: str
) -> None:
    impatient = APP.replace("start_timeout=60", "start_timeout=1.5")
    with running(tmp_path, code=impatient if mode == "start hangs" else APP) as master:
        code, answer = swap(master, tag="bad", mode=mode)
        assert code == 409, answer
        assert reason in answer["detail"]
        assert answer["operation"]["outcome"] == "refused"
        assert set(seen(master).values()) == {1}
        assert tags(master, 2) == {"plain"}
        # and nothing is left in the way of the next one
        code, answer = swap(master, tag="next", mode="good")
        assert code == 200, answer
        assert tags(master, 2) == {"next"}


@pytest.mark.parametrize("mode", ["die in second commit", "second setter raises"])
def test_a_worker_that_fails_after_the_decision_is_replaced_by_one_that_has_the_new_instance(
    tmp_path: Path, mode: str
) -> None:
    with running(tmp_path) as master:
        before = set(master.worker_pids())
        code, answer = swap(master, tag="new", mode=mode)
        assert code == 200, answer
        document = master.wait_status(
            lambda document: (
                len({w["pid"] for w in current(document)["workers"]} & before) == 1
                and len(current(document)["workers"]) == 2
                and all(w["state"] == "active" and w.get("services") for w in current(document)["workers"])
            )
        )
        assert {w["services"]["model"]["version"] for w in current(document)["workers"]} == {2}
        assert tags(master, 2) == {"new"}


def test_a_respawned_worker_and_the_next_generation_come_up_with_what_was_chosen(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        assert swap(master, tag="chosen")[0] == 200
        pids = set(master.worker_pids())
        os.kill(next(iter(pids)), signal.SIGKILL)
        master.wait_status(
            lambda document: (
                len(current(document)["workers"]) == 2
                and all(w["state"] == "active" for w in current(document)["workers"])
                and {w["pid"] for w in current(document)["workers"]} != pids
            )
        )
        assert tags(master, 2) == {"chosen"}
        assert set(seen(master).values()) == {2}
        master.reload("--wait", "drained")
        assert tags(master, 2) == {"chosen"}
        assert set(seen(master).values()) == {2}


def test_what_file_and_secret_file_say_now_replaces_what_was_chosen_and_no_secret_is_shown(
    tmp_path: Path,
) -> None:
    (tmp_path / "segue.toml").write_text("")
    with running(tmp_path) as master:
        assert swap(master, tag="chosen")[0] == 200
        (tmp_path / "key.txt").write_text("hush-hush\n")
        (tmp_path / "segue.toml").write_text('[services.model]\ntag = "said"\nkey_file = "key.txt"\n')
        code, answer = swap(master)
        assert code == 200, answer
        assert tags(master, 2) == {"said"}
        assert swap(master, key="another-secret")[0] == 200
        with Client(master.port) as client:
            assert client.json("/")["has_key"]
        assert master.reload("--wait", "drained")
        everything = json.dumps(master.status()) + master.output.text + json.dumps(answer)
        for pid in master.worker_pids():
            everything += Path(f"/proc/{pid}/cmdline").read_text()
        assert "hush-hush" not in everything
        assert "another-secret" not in everything


def test_wrong_requests_are_told_from_refusals(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        code, answer = master.call("POST", f"{HOT}/reload/coffee")
        assert (code, answer["known"]) == (404, ["dialogue", "model"])
        code, answer = swap(master, colour="red")
        assert code == 400
        assert "it takes key, mode, tag" in answer["detail"]
        assert master.call("GET", f"{HOT}/reload/model")[0] == 405
        done = master.command("reload", "coffee")
        assert done.returncode == 1
        assert "known: dialogue, model" in done.stderr
        assert master.command("reload", "model", "--set", "tag").returncode == 2
        assert master.command("reload", "--set", "tag=x").returncode == 2
        done = master.command("reload", "model", "--set", "tag=by-hand")
        assert done.returncode == 0, done.stderr
        assert "rewired: Dialogue" in done.stdout
        assert tags(master, 2) == {"by-hand"}


def test_swaps_queue_up_and_a_reload_and_a_swap_wait_for_one_another(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        code, slow = master.call("POST", f"{HOT}/reload/model?tag=first&mode=slow%20start&wait=0")
        assert code == 202
        code, answer = master.call("GET", f"{HOT}/operations/{slow['id']}?wait=50&phase=queued")
        assert answer["phase"] == "prepare"
        others = [
            master.call("POST", f"{HOT}/reload/model?tag=second&mode=good&wait=0")[1],
            master.call("POST", f"{HOT}/reload?wait=0")[1],
            master.call("POST", f"{HOT}/reload/model?tag=third&wait=0")[1],
        ]
        states = [master.call("GET", f"{HOT}/operations/{other['id']}")[1]["phase"] for other in others]
        assert states == ["queued"] * 3
        code, late = master.call("POST", f"{HOT}/reload/model?tag=fourth&wait=0.05")
        assert code == 504
        assert "goes on" in late["detail"]
        (tmp_path / "go").touch()
        for operation in (slow, *others, late["operation"]):
            document = master.call("GET", f"{HOT}/operations/{operation['id']}?wait=50")[1]
            assert document["outcome"] == "ok", document
        assert tags(master, 2) == {"fourth"}
        assert set(seen(master).values()) == {5}


def test_a_stop_in_the_middle_of_a_swap_answers_whoever_asked(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        answers: list[tuple[int, dict[str, Any]]] = []
        asker = threading.Thread(target=lambda: answers.append(swap(master, mode="slow start")))
        asker.start()
        master.wait_status(lambda _: len(list(tmp_path.glob("starting-*"))) == 2)
        master.stop()
        asker.join(30)
        assert answers
        assert answers[0][0] == 409
        assert "stopping" in answers[0][1]["detail"]


def test_streams_end_on_the_instance_on_which_they_began_over_swaps_and_reloads(tmp_path: Path) -> None:
    with running(tmp_path) as master:
        port, failures, counts = master.port, [], []
        ended = threading.Event()

        def listen() -> None:
            while not ended.is_set():
                with Client(port) as client:
                    lines = client.get("/stream?n=10&ms=15")[2].decode().split()
                if lines[-1] != "end" or len(lines) != 11 or len(set(lines[:-1])) != 1:
                    failures.append(lines)
                counts.append(lines[0])

        listeners = [threading.Thread(target=listen) for _ in range(10)]
        for listener in listeners:
            listener.start()
        with Load(port, "--keepalive", "10", "--newconn", "4", "--sse", "0") as load:
            for number in range(20):
                code, answer = swap(master, tag=f"v{number}")
                assert code == 200, answer
                if number % 5 == 4:
                    master.reload()
            load.nothing_lost()
        ended.set()
        for listener in listeners:
            listener.join(30)
        assert not failures
        assert len(set(counts)) > 3
        assert tags(master, 2) == {"v19"}
        # each old instance was closed, once in each worker that had it, after its last lease
        master.wait_status(
            lambda d: all(
                w.get("services") and not w["services"]["model"]["retiring"]
                for g in d["generations"]
                for w in g["workers"]
            )
        )
        closed = (tmp_path / "closed").read_text().split()
        assert {f"v{number}" for number in range(19)} <= set(closed)
        assert max(closed.count(tag) for tag in set(closed)) <= 4


def test_a_worker_swaps_alone_when_it_is_asked_itself_and_a_service_that_hangs_does_not_hold_up_the_status(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as master:
        worker = master.current()["workers"][0]
        code, answer = unix_call(worker["control"], "POST", f"{HOT}/reload/model?tag=here")
        assert (code, answer["version"], answer["rewired"]) == (200, 2, ["Dialogue"])
        assert tags(master, 2) == {"plain", "here"}
        assert unix_call(worker["control"], "POST", f"{HOT}/reload/nothing")[0] == 404
    (tmp_path / "segue.toml").write_text('[services.model]\nmode = "hung health"\n')
    with running(tmp_path) as master:
        # whom its service held up would be shown without what it says of it
        document = master.wait_status(lambda d: all(w.get("services") for w in current(d)["workers"]))
        service = current(document)["workers"][0]["services"]["model"]
        assert service["health"] is None
        assert "longer than" in service["health_unknown_because"]
        assert document["services"]["model"]["healthy"] is None


def test_a_section_of_a_service_that_does_not_exist_refuses_the_reload(tmp_path: Path) -> None:
    (tmp_path / "segue.toml").write_text("")
    with running(tmp_path) as master:
        (tmp_path / "segue.toml").write_text("[services.modle]\ntag = 'x'\n")
        done = master.command("reload")
        assert done.returncode == 1
        assert "services.modle: no such service; declared: dialogue, model" in done.stderr
        (tmp_path / "segue.toml").write_text("services = 1\n")
        assert "write [services.NAME]" in master.command("reload").stderr


def test_the_public_listener_takes_a_swap_with_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef\n")
    token.chmod(0o600)
    with running(tmp_path, "--token-file", str(token)) as master:
        with Client(master.port) as client:
            assert client.get(f"{HOT}/reload/model?tag=no", method="POST")[0] == 401
            client.connection.putrequest("POST", f"{HOT}/reload/model?tag=public")
            client.connection.putheader("Authorization", f"Bearer {token.read_text().strip()}")
            client.connection.putheader("Content-Length", "0")
            client.connection.endheaders()
            response = client.connection.getresponse()
            assert response.status == 200, response.read()
            assert json.loads(response.read())["rewired"] == ["Dialogue"]
        assert tags(master, 2) == {"public"}


KEYS: dict[str, Any] = {
    "draining": bool,
    "services_initialized": {
        "llm_interface": bool,
        "ham_manager": bool,
        "personality_manager": bool,
        "hsp_connector": bool,
    },
    "hsp": {"hsp_available": bool, "is_connected": bool, "fallback_enabled": bool},
    "mcp": {"mcp_available": bool, "is_connected": bool, "fallback_enabled": bool},
    "metrics": {
        "hsp": {"is_connected": bool, "pending_acks_count": int, "retry_counts_active": int},
        "mcp": {"is_connected": bool, "fallback_initialized": bool},
        "learning": {"known_ai_count": int},
        "memory": {"ham_store_size": int},
        "lis": {"incidents_recent": int, "antibodies_recent": int},
    },
}


def check(document: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        for key, inner in expected.items():
            check(document[key], inner)
    elif expected is int:
        assert document is None or (isinstance(document, int) and not isinstance(document, bool))
    else:
        assert isinstance(document, expected)


def test_the_status_of_every_application_has_the_same_keys_with_the_same_types(
    application, tmp_path: Path
) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        document = master.status()
        check(document, KEYS)
        assert not any(document["services_initialized"].values())
        assert document["metrics"]["learning"]["known_ai_count"] is None
        assert master.call("POST", f"{HOT}/reload/llm")[0] == 404
        master.command("drain", "start")
        check(master.status(), KEYS)
        assert master.status()["draining"] is True
        master.stop()
    with running(tmp_path) as master:
        document = master.wait_status(lambda d: d["services"])
        check(document, KEYS)
        assert document["services_initialized"]["model"] is True
