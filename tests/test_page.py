"""The chat page in a real browser: it streams, says who answered, and goes on over every swap."""

from __future__ import annotations

import os
from pathlib import Path

from backends import backend
from browser import browser, too_faint
from openai_server import openai_server
from scenario import HOT, ROOT, supervised

LAST = "[...document.querySelectorAll('article.assistant')].at(-1)"


def test_the_page_streams_over_reloads_and_swaps_and_says_who_answered(tmp_path: Path) -> None:
    (tmp_path / "segue.toml").write_text("")
    env = {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    with supervised("--workers", "2", cwd=tmp_path, env=env) as master, browser() as page:
        origin = f"http://127.0.0.1:{master.port}/"
        page.open(origin)
        page.wait("document.activeElement.id === 'message'")
        page.wait("document.getElementById('model').textContent === 'offline'")

        def say(text: str) -> None:
            page.wait("!document.getElementById('send').disabled")
            page.type(text)
            page.press_enter()

        say("hello there")
        page.wait(f"{LAST}?.querySelector('footer')?.textContent.includes('generation 1')")
        assert page.run(f"{LAST}.querySelector('p').textContent")
        say("calculate 6*7")
        page.wait(f"{LAST}.querySelector('footer')?.textContent.includes('used')")
        assert "42" in page.run(f"{LAST}.querySelector('p').textContent")
        master.reload()
        done = master.command("reload", "personality", "--profile", "warm")
        assert done.returncode == 0, done.stderr
        assert "EmotionSystem" in done.stdout
        assert "DialogueManager" in done.stdout
        # those that were idle have moved, too
        master.wait_status(
            lambda s: (
                not any(w["connections"] for g in s["generations"] if not g["current"] for w in g["workers"])
            )
        )
        say("tell me about yourself")
        page.wait(f"{LAST}.querySelector('footer')?.textContent.includes('generation 2')")
        assert "warm" in page.run(f"{LAST}.querySelector('footer').textContent")
        page.wait("document.getElementById('personality').textContent === 'warm'")
        assert page.run("document.querySelectorAll('article.wrong').length") == 0
        assert page.run("document.querySelectorAll('article').length") == 6
        if os.environ.get("SEGUE_SCREENSHOT"):
            page.screenshot(ROOT / "docs" / "chat.png")
        # the conversation is the service's: it is there again after the page was loaded anew, from another generation
        master.reload("--wait", "drained")
        page.open(origin)
        page.wait("document.querySelectorAll('article.assistant').length === 3")
        assert not too_faint(page)
        assert not page.errors
        assert all(url.startswith((origin, "data:", "about:")) for url in page.requested), page.requested
        master.stop()


def test_an_answer_goes_on_in_the_page_while_everything_behind_it_is_swapped(tmp_path: Path) -> None:
    """Held in the middle until a generation, the model and the personality have been replaced under it."""
    with openai_server() as server, browser() as page:
        settings = f'[services.llm]\nbase_url = "{server.url("held")}"\nmodel = "m"\n'
        with backend(tmp_path, settings) as running:
            master = running.master
            page.open(f"http://127.0.0.1:{master.port}/")
            page.wait("document.getElementById('model').textContent === 'm'")
            page.type("count to 30, and hold")
            page.press_enter()
            server.wait("held", 1)
            page.wait(f"{LAST}?.querySelector('p').textContent === '{numbers(15)}'")
            master.reload()
            for service in ("llm", "tools", "mcp", "memory", "personality?profile=warm"):
                code, answer = master.call("POST", f"{HOT}/reload/{service}")
                assert code == 200, answer
            page.wait("document.getElementById('generation').textContent === '2'")
            page.wait("document.getElementById('personality').textContent === 'warm'")
            assert page.run(f"{LAST}.querySelector('p').textContent") == numbers(15)
            assert page.run(f"{LAST}.className") == "assistant open", (
                "to the reader it is still being written"
            )
            server.release()
            page.wait(f"{LAST}.querySelector('footer')?.textContent === 'generation 1 · m · plain'")
            assert page.run(f"{LAST}.querySelector('p').textContent") == numbers(30)
            page.wait("!document.getElementById('send').disabled")
            page.type("count to 3")
            page.press_enter()
            page.wait(f"{LAST}.querySelector('footer')?.textContent === 'generation 2 · m · warm'")
            assert page.run(f"{LAST}.querySelector('p').textContent") == numbers(3)
            assert page.run("document.querySelectorAll('article.wrong').length") == 0
            assert not page.errors


def numbers(count: int) -> str:
    return "".join(f"{number} " for number in range(count))
