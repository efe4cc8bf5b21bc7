"""A headless Chromium driven over its debugging pipe (Chrome DevTools Protocol), with nothing but
the standard library.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chrome-headless-shell",
    "headless_shell",
    "msedge",
)


def installed() -> str | None:
    """The first browser of NAMES on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `events` holds what the page reported: (method, params)."""

    def __init__(self, path: str, limit: float = 300.0):
        self.limit = limit
        self.events = []
        self.number = 0
        self.rest = b""
        self.session = None
        self.profile = tempfile.TemporaryDirectory(
            prefix="recr1-browser-", ignore_cleanup_errors=True
        )
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()
        # it reads commands from descriptor 3 and writes to 4; no sandbox: inside containers there
        # is none to be had
        flags = (
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--no-default-browser-check",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            f"--user-data-dir={self.profile.name}",
            "about:blank",
        )
        # neither may stand where the other is to go
        low, high = (os.dup(fd) if fd in (3, 4) else fd for fd in (read, write))
        try:
            self.process = subprocess.Popen(
                [path, *flags],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                close_fds=False,
                pass_fds=(),
                preexec_fn=lambda: (
                    os.dup2(low, 63),
                    os.dup2(high, 62),
                    os.dup2(63, 3),
                    os.dup2(62, 4),
                    os.set_inheritable(3, True),
                    os.set_inheritable(4, True),
                ),
            )
        finally:
            for fd in {read, write, low, high}:
                os.close(fd)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.read), os.close(self.write)
        self.profile.cleanup()

    def call(self, method: str, **params) -> dict:
        """One command and its result. Raises RuntimeError for a refusal, TimeoutError when no
        answer comes.
        """
        self.number += 1
        message = dict(id=self.number, method=method, params=params) | (
            dict(sessionId=self.session) if self.session else {}
        )
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.limit
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append((answer.get("method"), answer.get("params", {})))

    def _next(self, deadline: float) -> dict:
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer within {self.limit:g} s")
            part = os.read(self.read, 1 << 20)
            if not part:
                raise RuntimeError("the browser is gone")
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def open(self, url: str) -> None:
        """Loads a page and waits until its script says that it is ready (<html data-ready>), or the
        time is over.
        """
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + self.limit
        while self.value("document.documentElement?.dataset.ready || ''") != "yes":
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{url} is not ready after {self.limit:g} s; it reported: {self.complaints()}"
                )
            time.sleep(0.05)

    def value(self, expression: str):
        """What the expression, or the promise it gives, comes to."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(
                result["exceptionDetails"].get("exception", {}).get("description")
                or result["exceptionDetails"]["text"]
            )
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """Exceptions, console messages of any kind, and what the browser itself logged (refused by
        the page's policy, failed to load).
        """
        found = []
        for method, p in self.events:
            if method == "Runtime.exceptionThrown":
                found.append(
                    p["exceptionDetails"].get("exception", {}).get("description")
                    or p["exceptionDetails"]["text"]
                )
            elif method == "Runtime.consoleAPICalled":
                found.append(
                    f"console.{p['type']}: "
                    f"{[a.get('value', a.get('description')) for a in p['args']]}"
                )
            elif method == "Log.entryAdded":
                found.append(f"{p['entry']['level']}: {p['entry']['text']}")
        return found

    def requests(self) -> list[str]:
        """Every address that was asked for."""
        return [
            p["request"]["url"]
            for method, p in self.events
            if method == "Network.requestWillBeSent"
        ]

    def look(self, width: int, height: int, dark: bool, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")],
        )

    def picture(self, path, clip: dict | None = None) -> None:
        more = dict(clip=clip | dict(scale=1), captureBeyondViewport=True) if clip else {}
        with open(path, "wb") as file:
            file.write(
                base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"])
            )
