"""A real Chromium without a window, steered over the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

DEADLINE_S = 60.0
_LOOK_S = 0.01
_CLOSE_S = 10.0


class NoBrowserError(Exception):
    """There is none on this machine."""


class NavigatedError(Exception):
    """The page has gone elsewhere before it answered."""


class Page:
    """One page of it."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.errors: list[str] = []
        """What the page wrote to its console as an error, and exceptions that nobody caught."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._call(f"{domain}.enable")
        self.requested: list[str] = []
        """The addresses of all requests."""

    def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=DEADLINE_S))
            if answer.get("id") == number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise NavigatedError
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] == "error":
                self.errors.append(json.dumps(params["args"]))
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])

    def open(self, url: str, width: int = 1000, height: int = 720) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def keep_nothing(self) -> None:
        """Load everything anew from now on, as who comes for the first time."""
        self._call("Network.setCacheDisabled", cacheDisabled=True)

    def run(self, script: str) -> Any:
        """The value of an expression; promises are waited for."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Wait until an expression is true, be it of the page that follows on this one."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(NavigatedError):
                if value := self.run(condition):
                    return value
                assert time.monotonic() < deadline, (
                    f"{condition} did not come: {self.run('document.body.innerText')}"
                )
                self.run("new Promise(requestAnimationFrame)")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def press_enter(self) -> None:
        self.press("Enter", 13, "\r")

    def press_tab(self) -> None:
        """To the next thing that can have the focus."""
        self.press("Tab", 9)

    def press(self, key: str, number: int, text: str = "") -> None:
        """A key of the keyboard, which writes `text`."""
        for kind in ("keyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=number,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    def prefer(self, colours: str) -> None:
        """As a system that is set to ``dark`` or ``light``."""
        features = [{"name": "prefers-color-scheme", "value": colours}]
        self._call("Emulation.setEmulatedMedia", features=features)

    def spoken(self) -> list[tuple[str, str]]:
        """Role and name of all that a screen reader finds."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def chromium(environ: Mapping[str, str]) -> Iterator[Page]:
    """A browser of its own with one page. Raises `NoBrowserError` where it isn't installed."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise NoBrowserError("chromium is not installed")
    with tempfile.TemporaryDirectory(prefix="segue-b-", ignore_cleanup_errors=True) as home:
        said = Path(home, "output")
        with said.open("wb") as output:
            process = subprocess.Popen(
                [
                    program,
                    "--headless=new",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-dev-shm-usage",
                    "--disable-background-networking",
                    "--no-first-run",
                    "--remote-debugging-port=0",
                    f"--user-data-dir={home}",
                    "about:blank",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environ, "HOME": home},
                start_new_session=True,
            )
        try:
            address = _address(process, Path(home, "DevToolsActivePort"), said)
            with connect(address, max_size=None, ping_interval=None) as socket:
                yield Page(socket)
                socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_S)
            if process.poll() is None:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], port_file: Path, said: Path) -> str:
    """Where it can be steered: it writes port and path into a file when it is ready."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            written = port_file.read_text().splitlines()
            if len(written) == 2:
                return f"ws://127.0.0.1:{written[0]}{written[1]}"
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"chromium does not start:\n{said.read_text(errors='replace')}")
        time.sleep(_LOOK_S)
