"""A headless Chromium, driven over WebDriver: chromedriver takes JSON over HTTP, so that needs no package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver") or shutil.which("chromium.chromedriver")
MISSING = None if CHROMIUM and DRIVER else "there is no Chromium here: apt-get install chromium chromium-driver"
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Shift": "\ue008", "Alt": "\ue00a", "Tab": "\ue004", "Up": "\ue013",
        "Backspace": "\ue003", "Control": "\ue009"}  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that WebDriver has for elements


@dataclass
class Browser:
    client: httpx.Client  # of one session

    def ask(self, path: str, **body: Any) -> Any:
        answer = self.client.post(path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer["message"]
        return answer

    def open(self, url: str) -> None:
        self.ask("url", url=url)

    def js(self, script: str, *arguments: Any) -> Any:
        """What a function with this body returns; promises are waited for."""
        return self.ask("execute/sync", script=script, args=list(arguments))

    def find(self, css: str) -> Any:
        return self.ask("element", using="css selector", value=css)

    def click(self, css: str) -> None:
        self.ask(f"element/{self.find(css)[ELEMENT]}/click")

    def name(self, css: str) -> str:
        """What a screen reader calls it."""
        return self.client.get(f"element/{self.find(css)[ELEMENT]}/computedlabel").json()["value"]

    def press(self, *keys: str) -> None:
        """Keys at once, by name or character, to what has the focus."""
        codes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": "keyDown", "value": code} for code in codes]
        actions += [{"type": "keyUp", "value": code} for code in reversed(codes)]
        self.ask("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def type(self, text: str) -> None:
        """Text, to what has the focus."""
        actions = [{"type": kind, "value": character} for character in text for kind in ("keyDown", "keyUp")]
        self.ask("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def until(self, condition: str, *arguments: Any, seconds: float = 20) -> Any:
        """Wait for an expression to be true."""
        end = time.monotonic() + seconds
        while not (found := self.js(f"return {condition}", *arguments)):
            assert time.monotonic() < end, (
                f"{condition} never came; the page says: {self.js('return document.body.innerText')}"
            )
            time.sleep(0.02)
        return found

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self.ask("goog/cdp/execute", cmd=command, params=parameters)

    def complaints(self) -> list[str]:
        """What the console got since it was last asked: errors of scripts, refused loads, broken policies."""
        return [entry["message"] for entry in self.ask("se/log", type="browser") if entry["level"] == "SEVERE"]

    def picture(self, file: Path) -> None:
        import base64

        file.write_bytes(base64.b64decode(self.client.get("screenshot").json()["value"]))


@contextmanager
def browsing(home: Path) -> Iterator[Browser]:
    """A browser of its own, which keeps what it keeps below `home`."""
    assert CHROMIUM is not None
    assert DRIVER is not None
    said = home / "chromedriver.txt"
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    with open(said, "w") as file:
        process = subprocess.Popen([DRIVER, "--port=0"], stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        port = _port(process, said)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            arguments = ["--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1200,900",
                         "--disable-background-networking", "--no-first-run", "--force-color-profile=srgb"]  # fmt: skip
            if os.geteuid() == 0:
                arguments.append("--no-sandbox")  # Chromium does not run as root with it
            wanted = {
                "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            for _ in range(3):  # on a busy machine it happens that Chromium does not come up
                answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
                if "sessionId" in answer:
                    break
            assert "sessionId" in answer, answer.get("message", answer)
            session = f"http://127.0.0.1:{port}/session/{answer['sessionId']}"
            client.base_url = httpx.URL(session)
            try:
                yield Browser(client)
            finally:
                client.delete(session).raise_for_status()  # ends the browser, too
    finally:
        left = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(20)
        for each in left:  # none, unless the session did not end as it should
            with suppress(psutil.NoSuchProcess):
                each.kill()


def _port(process: subprocess.Popen[bytes], said: Path) -> int:
    for _ in range(600):
        if (found := re.search(r"started successfully on port (\d+)", said.read_text())) is not None:
            return int(found[1])
        assert process.poll() is None, said.read_text()
        time.sleep(0.05)
    raise AssertionError(said.read_text())
