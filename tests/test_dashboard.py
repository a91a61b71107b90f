"""The dashboard in a real browser: it shows what is so, live, and what it is asked for it does and says how it went."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
from typing import Any

from browser import Page, browser, too_faint
from scenario import DEADLINE_S, HOT, ROOT, TOKEN, Client, Segue, free_port, supervised, tcp_call


def live(page: Page) -> None:
    page.wait("document.getElementById('link').textContent === 'live'")


def sign_in(page: Page) -> None:
    page.wait("!document.getElementById('signin').hidden")  # what is hidden takes no focus, and no keys
    page.run("document.getElementById('token').focus()")
    page.type(TOKEN)
    page.press_enter()
    page.wait("document.querySelector('[data-action=reload]').ariaDisabled === null")


def press(page: Page, selector: str) -> str:
    """Press a button, and wait for the outcome that is shown."""
    said = page.run("document.querySelector('#outcomes li')?.textContent ?? ''")
    page.run(f"document.querySelector({json.dumps(selector)}).click()")
    page.wait(
        f"(line => line && line.textContent !== {json.dumps(said)} && ['good', 'bad'].includes(line.dataset.tone))"
        "(document.querySelector('#outcomes li'))"
    )
    return str(page.run("document.querySelector('#outcomes li').textContent"))


def cells(page: Page, table: str) -> list[list[str]]:
    rows: list[list[str]] = page.run(
        f"[...document.querySelectorAll('#{table} tbody tr')].map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    return rows


def test_the_dashboard_shows_what_is_so_and_steers_it(application, token_file) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    more = ("--workers", "2", "--probation", "600")
    with supervised("shop:app", *flags, *more, cwd=application("1")) as master, browser() as page:
        origin = f"http://127.0.0.1:{port}/"
        page.open(origin, height=1400)
        live(page)
        assert [row[0] for row in cells(page, "generations")] == ["1"]
        assert [row[0] for row in cells(page, "workers")] == ["1/1", "1/2"]
        assert [int(row[1]) for row in cells(page, "workers")] == master.worker_pids()
        with Client(master.port) as client:
            while not any(row[6].startswith("≤ ") for row in cells(page, "workers")):
                assert client.get("/")[0] == 200
            assert any(row[7].startswith("≤ ") and float(row[5]) > 0 for row in cells(page, "workers"))
        assert page.run("document.querySelector('[data-action=reload]').ariaDisabled") == "true"
        sign_in(page)
        assert "generation 2" in press(page, "[data-action=reload]")
        page.wait("document.querySelector('#generations tbody tr').cells[1].innerText === 'active'")
        page.wait("document.querySelector('#generations tbody tr').innerText.includes('on probation for')")
        page.wait("document.querySelectorAll('#timeline rect[data-state=active]').length === 2")

        application("3", prelude="import redis_that_is_not_there\n")
        outcome = press(page, "[data-action=reload]")
        assert "refused" in outcome
        assert "redis_that_is_not_there" in outcome
        page.wait(
            "document.querySelector('#reloads details pre')?.textContent.includes('ModuleNotFoundError')"
        )
        page.wait("document.querySelector('#timeline rect[data-state=failed]') !== null")
        page.wait("document.querySelector('#events')?.textContent.includes('promoted')")

        application("1")
        assert press(page, "[data-action=scale][data-delta='1']") == "Scale to 3: done"
        assert len(master.worker_pids()) == 3
        assert "done" in press(page, "[data-action=drain][data-mode=reject]")
        page.wait("document.getElementById('readiness').textContent === 'draining (reject)'")
        assert not master.status()["ready"]
        assert "done" in press(page, "[data-action=undrain]")
        page.wait("document.getElementById('readiness').textContent === 'ready'")
        if os.environ.get("SEGUE_SCREENSHOT"):
            page.run("document.querySelectorAll('#outcomes pre').forEach(element => element.remove())")
            page.screenshot(ROOT / "docs" / "dashboard.png")
        # a phone
        page.open(origin, width=360, height=800)
        live(page)
        page.wait("document.querySelector('#reloads details') !== null")
        page.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert not page.errors
        assert all(url.startswith((origin, "data:", "about:")) for url in page.requested), page.requested
        assert not [url for url in page.requested if TOKEN in url]
        master.stop()


def test_it_is_steered_from_the_keyboard_and_read_by_a_screen_reader(application, token_file) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file), "--probation", "600")
    with supervised("shop:app", *flags, cwd=application("1")) as master, browser() as page:
        page.open(f"http://127.0.0.1:{port}/")
        live(page)
        focus(page, "document.activeElement.id === 'token'")
        page.type(TOKEN)
        page.press_enter()
        page.wait("document.querySelector('[data-action=reload]').ariaDisabled === null")
        focus(page, "document.activeElement.dataset.action === 'reload'")
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.press_enter()
        page.wait("document.querySelector('#outcomes li')?.dataset.tone === 'good'")
        assert page.run("document.getElementById('outcomes').ariaLive") == "polite"
        assert page.run("document.activeElement.dataset.action") == "reload", "the focus stays"
        page.wait("document.querySelector('#generations tbody tr').innerText.includes('on probation for ')")
        spoken = page.spoken()
        for role, name in spoken:
            assert name or role not in {"button", "textbox", "link", "table", "region", "heading", "image"}, (
                role
            )
        assert ("button", "One worker more") in spoken
        master.stop()


def test_whoever_types_never_loses_the_focus_to_nowhere(application, token_file) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with supervised("shop:app", *flags, cwd=application("1")) as master, browser() as page:
        page.open(f"http://127.0.0.1:{port}/")
        live(page)
        page.wait("!document.getElementById('signin').hidden")
        page.run("document.getElementById('token').focus()")
        page.type("nothing-like-it-at-all")
        page.press_enter()
        note = "document.getElementById('signin-note')"
        page.wait(f"{note}.textContent === 'that is not the token of --token-file'")
        assert page.run(f"{note}.role") == "alert"
        assert page.run("document.activeElement.id") == "token"
        more = master.command("scale", "2")
        assert more.returncode == 0, more.stderr
        page.wait("document.getElementById('workers-wanted').textContent === '2'")
        assert page.run(f"{note}.textContent"), "news of something else leave it"
        sign_in(page)
        page.wait("document.activeElement.dataset.action === 'reload'")
        assert page.run(f"{note}.textContent") == ""

        focus(page, "document.activeElement.dataset.mode === 'reject'")
        page.press_enter()
        page.wait("document.querySelector('[data-mode=reject]').ariaDisabled === 'true'")
        assert page.run("document.activeElement.dataset.mode") == "reject"
        page.press_enter()  # does nothing now
        focus(page, "document.activeElement.dataset.action === 'undrain'")
        page.press_enter()
        page.wait("document.querySelector('[data-action=undrain]').ariaDisabled === 'true'")
        assert page.run("document.activeElement.dataset.action") == "undrain"
        page.wait("document.querySelectorAll('#outcomes li[data-tone=good]').length === 2")
        assert page.run("document.querySelectorAll('#outcomes li').length") == 2
        assert "done" in press(page, "[data-action=scale][data-delta='-1']")
        page.wait("document.querySelector('[data-delta=\"-1\"]').ariaDisabled === 'true'")  # one is the least

        page.wait("document.querySelectorAll('#events li').length > 0")
        page.run("document.getElementById('signout').click()")
        page.wait("document.activeElement.id === 'token'")
        assert page.run("document.querySelectorAll('#events li').length") == 0
        assert not page.errors
        master.stop()


def test_everything_can_be_told_from_its_ground_in_both_themes(application, token_file) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    code = application("1")
    with supervised("shop:app", *flags, cwd=code) as master, browser() as page:
        assert master.command("stage").returncode == 0
        application("3", prelude="import redis_that_is_not_there\n")
        assert master.command("reload").returncode == 1
        assert master.command("drain", "start").returncode == 0
        page.open(f"http://127.0.0.1:{port}/")
        live(page)
        for signed_in in (False, True):
            if signed_in:
                sign_in(page)
                page.wait("document.querySelectorAll('#events li[data-tone=bad]').length > 0")
            assert not too_faint(page), f"signed in: {signed_in}"
        master.stop()


def test_what_failed_workers_printed_is_for_those_who_may_steer(application, token_file) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with supervised("shop:app", *flags, cwd=application("1")) as master, browser() as page:
        application("2", prelude="print('postgres://shop:hunter2@db')\nimport redis_that_is_not_there\n")
        assert master.command("reload").returncode == 1
        assert "hunter2" in json.dumps(master.status())
        seen = json.dumps(tcp_call(port, "GET", f"{HOT}/status")[2])
        assert "redis_that_is_not_there" in seen, "the reason is for all"
        assert "hunter2" not in seen
        assert "hunter2" in json.dumps(tcp_call(port, "GET", f"{HOT}/status", TOKEN)[2])
        page.open(f"http://127.0.0.1:{port}/")
        live(page)
        page.wait("document.querySelector('#reloads').innerText.includes('redis_that_is_not_there')")
        assert "hunter2" not in page.run("document.body.textContent")
        sign_in(page)
        page.wait("document.querySelector('#reloads details pre')?.textContent.includes('hunter2')")
        page.run("document.getElementById('signout').click()")
        page.wait("!document.body.textContent.includes('hunter2')")
        master.stop()


def test_who_is_signed_in_to_one_instance_stays_so_when_signing_in_to_another_on_the_same_host(
    application, token_file, tmp_path
) -> None:
    other_token = tmp_path / "other-token"
    other_token.write_text("another-token-of-many-letters\n")
    other_token.chmod(0o600)
    ports = free_port(), free_port()
    code = application("1")
    with (
        supervised(
            "shop:app", "--admin", f"127.0.0.1:{ports[0]}", "--token-file", str(token_file), cwd=code
        ) as one,
        supervised(
            "shop:app", "--admin", f"127.0.0.1:{ports[1]}", "--token-file", str(other_token), cwd=code
        ) as other,
    ):
        cookies = [
            session(ports[0], TOKEN),
            session(ports[1], "another-token-of-many-letters"),
        ]
        assert all(set(COOKIE_FLAGS) <= set(each.split("; ")) for each in cookies)
        both = "; ".join(each.partition(";")[0] for each in cookies)
        assert cookies[0].partition("=")[0] != cookies[1].partition("=")[0]
        for port in ports:
            assert ask_session(port, "GET", {"Cookie": both})[1]["act"]
        forged = both[:-1] + ("0" if both[-1] != "0" else "1")
        assert not ask_session(ports[1], "GET", {"Cookie": forged})[1]["act"]
        one.stop()
        other.stop()


COOKIE_FLAGS = ("HttpOnly", "SameSite=Strict", "Path=/")


def ask_session(port: int, method: str, headers: dict[str, str]) -> tuple[str, Any]:
    """The cookie that is set, and what whoever asks may do."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request(method, "/session", headers=headers)
        answer = connection.getresponse()
        return answer.headers.get("Set-Cookie", ""), json.loads(answer.read())
    finally:
        connection.close()


def session(port: int, token: str) -> str:
    """The cookie of who signs in."""
    origin = {"Origin": f"http://127.0.0.1:{port}", "X-Segue-Page": "1"}
    return ask_session(port, "POST", {"Authorization": f"Bearer {token}", **origin})[0]


def focus(page: Page, condition: str) -> None:
    """Press Tab until that has the focus."""
    for _ in range(60):
        if page.run(condition):
            return
        page.press_tab()
    raise AssertionError(f"no Tab leads to {condition}")


def test_it_reconnects_by_itself_and_keeps_its_history_over_an_upgrade_of_the_master(
    application, token_file
) -> None:
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with supervised("shop:app", *flags, cwd=application("1")) as master, browser() as page:
        page.open(f"http://127.0.0.1:{port}/")
        live(page)
        sign_in(page)
        press(page, "[data-action=reload]")
        page.wait("document.querySelector('#generations tbody tr').cells[1].innerText === 'active'")
        master.wait_status(lambda document: [each["id"] for each in document["generations"]] == [2])
        before = timeline(master)
        assert [fingerprint for _, fingerprint, _ in before] == [master.current()["fingerprint"]] * 2
        page.run("window.stillHere = true")
        done = master.command("upgrade")
        assert done.returncode == 0, done.stderr
        epoch = master.status()["master"]["epoch"]
        assert epoch == 2
        page.wait("document.getElementById('summary').textContent.includes('up 0 s') || window.stillHere")
        page.wait(
            f"fetch('{HOT[1:]}/status').then(answer => answer.json()).then(status => status.master.epoch === 2)"
        )
        live(page)
        assert page.run("window.stillHere")
        assert timeline(master)[: len(before)] == before
        page.wait(f"document.querySelector('#timeline').textContent.includes('{before[0][1]}')")
        assert "generation 3" in press(page, "[data-action=reload]")  # still signed in
        page.wait("document.querySelectorAll('#reloads tbody tr').length === 3")
        master.stop()


def timeline(master: Segue) -> list[Any]:
    """Generations and the states that they have left."""
    return [[each["id"], each["fingerprint"], each["states"][:-1]] for each in master.status()["timeline"]]


def test_services_are_swapped_from_the_page(tmp_path, token_file) -> None:
    (tmp_path / "segue.toml").write_text("")
    port = free_port()
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    env = {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    with supervised(*flags, cwd=tmp_path, env=env) as master, browser() as page:
        page.open(f"http://127.0.0.1:{port}/")
        live(page)
        sign_in(page)
        page.wait("!document.getElementById('services-section').hidden")
        row = "#services tr[data-key=personality]"
        page.run(f"document.querySelector('{row} input').value = 'profile=warm'")
        assert "done" in press(page, f"{row} button")
        page.wait(f"document.querySelector('{row}').cells[1].innerText === '2'")
        master.stop()


def test_the_same_page_stands_on_the_control_socket(application) -> None:
    with supervised("shop:app", cwd=application("1")) as master:
        done = subprocess.run(
            ["curl", "-sS", "-i", "--unix-socket", master.control, "http://localhost/"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("HTTP/1.1 200")
        assert "default-src 'self'" in done.stdout
        code, document = master.call("GET", "/session")
        assert (code, document["act"]) == (200, True)
        master.stop()


def test_without_a_token_file_it_is_read_only(application) -> None:
    port = free_port()
    with (
        supervised("shop:app", "--admin", f"127.0.0.1:{port}", cwd=application("1")) as master,
        browser() as page,
    ):
        page.open(f"http://127.0.0.1:{port}/")
        live(page)
        page.wait("document.getElementById('steer-note').textContent.includes('--token-file')")
        assert page.run("document.getElementById('signin').hidden")
        assert page.run(
            "[...document.querySelectorAll('[data-action]')].every(button => button.ariaDisabled === 'true')"
        )
        master.stop()
