"""A headless browser for tests: Chromium, by the WebDriver protocol of its chromedriver."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

KEYS = {"left": "\ue012", "right": "\ue014", "down": "\ue015", "escape": "\ue00c"}
KEYS |= {
    "enter": "\ue007",
    "end": "\ue010",
    "home": "\ue011",
    "page up": "\ue00e",
    "page down": "\ue00f",
    "tab": "\ue004",
}


def missing() -> str | None:
    """Say which program is not there."""
    lost = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"needs {' and '.join(lost)} (Debian: chromium, chromium-driver)" if lost else None


class Browser:
    """One window; `close` ends it."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1400, 900)) -> None:
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._base = f"http://127.0.0.1:{port}"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += [f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]
        options = {"args": flags, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self._wait_for_driver()
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._driver.kill()
            raise
        self._base += f"/session/{session['sessionId']}"

    def _wait_for_driver(self) -> None:
        for _ in range(300):
            try:
                if self._call("GET", "/status")["ready"]:
                    return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:1000]) from error

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *values: object) -> Any:
        """Run the body of a function and return what it returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(values)})

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        script = "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 30))"
        self._call("POST", "/execute/async", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        """Press and release keys, each a character or a name of `KEYS`."""
        values = [KEYS.get(key, key) for key in keys]
        steps = [{"type": f"key{way}", "value": v} for v in values for way in ("Down", "Up")]
        self._act({"type": "key", "id": "keys", "actions": steps})

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at a place of the window, move it to another, and let go."""

        def move(place: tuple[float, float]) -> dict[str, object]:
            x, y = map(round, place)
            return {"type": "pointerMove", "x": x, "y": y, "duration": 50, "origin": "viewport"}

        down, up = ({"type": f"pointer{way}", "button": 0} for way in ("Down", "Up"))
        steps = [move(start), down, move(end), up]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self._act(mouse | {"actions": steps})

    def click(self, selector: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{next(iter(found.values()))}/click", {})

    def _act(self, source: dict[str, object]) -> None:
        self._call("POST", "/actions", {"actions": [source]})
        self.settle()

    def media(self, **features: str) -> None:
        """Set media features, such as ``prefers_color_scheme="dark"``."""
        values = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": values}}
        self._call("POST", "/goog/cdp/execute", command)

    def picture(self) -> Image.Image:
        """Return what the window shows."""
        data = base64.b64decode(self._call("GET", "/screenshot"))
        return Image.open(io.BytesIO(data)).convert("RGB")

    def printed(self) -> bytes:
        """Return the page on paper, as PDF."""
        return base64.b64decode(self._call("POST", "/print", {"background": True}))

    def complaints(self) -> list[str]:
        """Return what the browser logged since the last call: errors, and all that it blocked."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(30)
