"""The dashboard in a real browser: it shows what is so, live, and what it is asked for it does and says how it went."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any

from browser import Page, browser
from scenario import HOT, ROOT, TOKEN, Client, Segue, free_port, supervised


def live(page: Page) -> None:
    page.wait("document.getElementById('link').textContent === 'live'")


def sign_in(page: Page) -> None:
    page.wait("!document.getElementById('signin').hidden")  # what is hidden takes no focus, and no keys
    page.run("document.getElementById('token').focus()")
    page.type(TOKEN)
    page.press_enter()
    page.wait("!document.querySelector('[data-action=reload]').disabled")


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
    flags = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file), "--workers", "2")
    with supervised("shop:app", *flags, cwd=application("1")) as master, browser() as page:
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
        assert page.run("document.querySelector('[data-action=reload]').disabled")
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
        page.wait("!document.querySelector('[data-action=reload]').disabled")
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
        for colours in ("dark", "light"):
            page.prefer(colours)
            ground = page.run("getComputedStyle(document.body).backgroundColor")
            ink = page.run("getComputedStyle(document.body).color")
            assert contrast(ground, ink) > 7, (colours, ground, ink)
        master.stop()


def focus(page: Page, condition: str) -> None:
    """Press Tab until that has the focus."""
    for _ in range(60):
        if page.run(condition):
            return
        page.press_tab()
    raise AssertionError(f"no Tab leads to {condition}")


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 counts it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


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
        assert "generation 3" in press(page, "[data-action=reload]")  # still signed in
        page.wait("document.querySelectorAll('#reloads tbody tr').length === 3")
        master.stop()


def timeline(master: Segue) -> list[Any]:
    """Generations and the states that they have left."""
    return [[each["id"], each["states"][:-1]] for each in master.status()["timeline"]]


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
        assert page.run("[...document.querySelectorAll('[data-action]')].every(button => button.disabled)")
        master.stop()
