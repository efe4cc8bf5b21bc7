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
# no sandbox: inside containers there is none to be had
FLAGS = (
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
)
DOMAINS = ("Page", "Runtime", "Network", "Log")
# the descriptors from which the browser reads commands, and to which it writes answers
COMMANDS = 3
ANSWERS = 4


def installed() -> str | None:
    """Return the path of the first browser of NAMES on PATH, None without one."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    return None


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
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        self.process = self._start(path, read, write)

        target = self.call("Target.createTarget", url="about:blank")
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = session["sessionId"]
        for domain in DOMAINS:
            self.call(f"{domain}.enable")

    def _start(self, path: str, read: int, write: int) -> subprocess.Popen:
        """Start the process on its ends of the two pipes, and close them in this one."""
        # neither may stand where the other is to go
        low = _avoid_targets(read)
        high = _avoid_targets(write)

        def connect_pipes():
            os.dup2(low, 63)
            os.dup2(high, 62)
            os.dup2(63, COMMANDS)
            os.dup2(62, ANSWERS)
            os.set_inheritable(COMMANDS, True)
            os.set_inheritable(ANSWERS, True)

        command = [path, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        try:
            return subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                close_fds=False,
                pass_fds=(),
                preexec_fn=connect_pipes,
            )
        finally:
            for descriptor in {read, write, low, high}:
                os.close(descriptor)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
        self.profile.cleanup()

    def call(self, method: str, **params) -> dict:
        """Send one command and return its result.

        Raises RuntimeError for a refusal, TimeoutError when no answer comes.
        """
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        line = json.dumps(message).encode()
        os.write(self.write, line + b"\0")

        deadline = time.monotonic() + self.limit
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self.number:
                break
            event = (answer.get("method"), answer.get("params", {}))
            self.events.append(event)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self, deadline: float) -> dict:
        """Read the next message of the browser: an answer or an event."""
        while b"\0" not in self.rest:
            seconds = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self.read], [], [], seconds)
            if not readable:
                raise TimeoutError(f"the browser did not answer within {self.limit:g} s")
            data = os.read(self.read, 1 << 20)
            if not data:
                raise RuntimeError("the browser is gone")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def open(self, url: str) -> None:
        """Load a page and wait until its script says that it is ready (<html data-ready>), or the
        time is over.
        """
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + self.limit
        while self.value("document.documentElement?.dataset.ready || ''") != "yes":
            if time.monotonic() > deadline:
                complaints = self.complaints()
                raise TimeoutError(
                    f"{url} is not ready after {self.limit:g} s; it reported: {complaints}"
                )
            time.sleep(0.05)

    def value(self, expression: str):
        """Evaluate the expression, or the promise it gives.

        Raises RuntimeError for an exception of the page.
        """
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            description = _describe_exception(answer["exceptionDetails"])
            raise RuntimeError(description)
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """List exceptions, console messages of any kind, and what the browser itself logged
        (refused by the page's policy, failed to load).
        """
        complaints = []
        for method, params in self.events:
            if method == "Runtime.exceptionThrown":
                complaint = _describe_exception(params["exceptionDetails"])
                complaints.append(complaint)
            elif method == "Runtime.consoleAPICalled":
                complaint = _describe_console_message(params)
                complaints.append(complaint)
            elif method == "Log.entryAdded":
                entry = params["entry"]
                complaints.append(f"{entry['level']}: {entry['text']}")
        return complaints

    def requests(self) -> list[str]:
        """List every address that was asked for."""
        addresses = []
        for method, params in self.events:
            if method == "Network.requestWillBeSent":
                addresses.append(params["request"]["url"])
        return addresses

    def look(self, width: int, height: int, dark: bool, phone: bool = False) -> None:
        """Set the window's size in pixels, the color scheme, and whether it is a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = "dark" if dark else "light"
        feature = dict(name="prefers-color-scheme", value=scheme)
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path, clip: dict | None = None) -> None:
        """Write a PNG of the window, or of the page's rectangle clip: x, y, width, height."""
        options = {}
        if clip:
            options["clip"] = clip | dict(scale=1)
            options["captureBeyondViewport"] = True
        answer = self.call("Page.captureScreenshot", format="png", **options)
        image = base64.b64decode(answer["data"])
        with open(path, "wb") as file:
            file.write(image)


def _avoid_targets(descriptor: int) -> int:
    """Return a copy of a descriptor that is one of COMMANDS and ANSWERS, else itself."""
    if descriptor in (COMMANDS, ANSWERS):
        return os.dup(descriptor)
    return descriptor


def _describe_exception(details: dict) -> str:
    exception = details.get("exception", {})
    return exception.get("description") or details["text"]


def _describe_console_message(params: dict) -> str:
    values = []
    for argument in params["args"]:
        description = argument.get("description")
        value = argument.get("value", description)
        values.append(value)
    return f"console.{params['type']}: {values}"
