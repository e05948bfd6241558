"""What the tests need besides Python: browsers, and a few programs. What is missing is installed.

A Chromium, Chrome or Edge of the system is used as it is. If there is none, Playwright downloads
a Chromium into the user's own folder. If that cannot start (Debian without a desktop lacks its
libraries), Debian's package is installed, where the tests run as root. Where none of this works,
the tests that need it are skipped. On a CI server they fail instead: there, nobody would notice.
"""

import asyncio
import contextlib
import fcntl
import functools
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from playwright.async_api import async_playwright

CHROMIUMS = [
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
]
CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CHROMIUM_PACKAGES = ["chromium", "libatomic1"]  # Playwright itself needs the second
# The programs that the tutorial's commands use, and the Debian packages that have them.
PACKAGES = {"bash": "bash", "curl": "curl", "git": "git", "pkill": "procps"}
# Firefox and WebKit are tested as well where they are installed: .ci/run does that, on Debian.
ENGINES = ["chromium"]
ENGINES += ["firefox"] if shutil.which("firefox-esr") else []
ENGINES += ["webkit"] if shutil.which("WebKitWebDriver") and shutil.which("Xvfb") else []


def need(found, message):
    """Skip the test, or let it fail on a CI server, if something was not found."""
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


def once(request, name, function):
    """Call a function in one worker of pytest-xdist, and share its result with the others."""
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers have this one
    with open(folder / "found.json", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # for all functions: apt-get cannot run twice at a time
        file.seek(0)
        results = dict(map(json.loads, file))
        if name not in results:
            capture = request.config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():  # what it prints is seen at once
                results[name] = function()
            print(json.dumps([name, results[name]]), file=file)
    return results[name]


def install(*packages):
    """Install packages of Debian, if that is possible, and say so."""
    if os.getuid() == 0 and shutil.which("apt-get"):
        print("\nThe tests install", *packages, "with apt-get ...", file=sys.stderr)
        run_quietly("apt-get", "update")
        run_quietly("apt-get", "install", "-y", "--no-install-recommends", *packages)


def need_programs(request, *names):
    """What a test needs to have on the PATH."""
    for name in names:
        if not shutil.which(name):
            once(request, name, functools.partial(install, PACKAGES[name]))
        need(shutil.which(name), f"{name} is missing (Debian: apt-get install {PACKAGES[name]})")


def find_chromium():
    """The path of a Chromium that starts; "" for the one of Playwright; or None."""
    for path in [*filter(None, map(shutil.which, CHROMIUMS)), ""]:
        if starts(path):
            return path
    print("\nThe tests have Playwright download a Chromium ...", file=sys.stderr)
    run_quietly(sys.executable, "-m", "playwright", "install", "--only-shell", "chromium")
    if starts(""):
        return ""
    install(*CHROMIUM_PACKAGES)
    path = shutil.which("chromium")
    return path if path and starts(path) else None


START = f"""
import sys
from playwright.sync_api import sync_playwright
with sync_playwright() as it:
    it.chromium.launch(executable_path=sys.argv[1] or None, args={CHROMIUM_OPTIONS}).close()
"""


def starts(path):
    """Whether a browser can be started. Playwright itself may lack a library, too."""
    return run_quietly(sys.executable, "-c", START, path)


def run_quietly(*command):
    """Run a program: whether all went well."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        options = {"capture_output": True, "timeout": 600, "env": env}
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, **options)
        return True
    return False


NO_BROWSER = "no browser: install Chromium (Debian: apt-get install chromium libatomic1)"


@contextlib.asynccontextmanager
async def browser(request):
    """A running Chromium; None if there is none, and none can be installed."""
    path = await asyncio.to_thread(once, request, "chromium", find_chromium)
    if path is None:
        yield None
        return
    async with async_playwright() as playwright:
        it = await playwright.chromium.launch(executable_path=path or None, args=CHROMIUM_OPTIONS)
        yield it
        await it.close()


START_TIMEOUT = 60  # seconds
WEBDRIVER_PATHS = {
    "NewSession": "/session",
    "Navigate": "/url",
    "ExecuteScript": "/execute/sync",
    "PerformActions": "/actions",
    "SetWindowRect": "/window/rect",
}
WEBDRIVER_KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Tab": "\ue004"}


class Driven:
    """A page of Firefox or WebKit, in dark, with what walk() needs of a page of Playwright.

    Both speak WebDriver (https://www.w3.org/TR/webdriver2): Firefox in frames of its own, which
    it calls Marionette, and WebKit in HTTP.
    """

    def __init__(self, engine, folder, port):
        self.engine, self.folder, self.port, self.session = engine, folder, port, ""
        self.keyboard, self.processes = self, contextlib.ExitStack()

    def run(self, *command, **options):
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, **options)
        self.processes.callback(process.wait)
        self.processes.callback(process.terminate)

    async def __aenter__(self):
        port, env = str(self.port), dict(os.environ)
        if self.engine == "firefox":
            dark = "layout.css.prefers-color-scheme.content-override"
            preferences = f'user_pref("marionette.port", {port});\nuser_pref("{dark}", 0);\n'
            (self.folder / "user.js").write_text(preferences)
            self.run("firefox-esr", "--headless", "--marionette", "--profile", self.folder)
        else:
            display, other = os.pipe()
            self.run("Xvfb", "-displayfd", str(other), pass_fds=[other])
            env |= {"DISPLAY": f":{os.read(display, 9).decode().strip()}"}
            self.run("WebKitWebDriver", "-p", port, env=env | {"GTK_THEME": "Adwaita:dark"})
        await asyncio.to_thread(self.connect)
        self.session = (await self.call("NewSession", capabilities={}))["sessionId"]
        return self

    async def __aexit__(self, *_):
        if self.engine == "webkit":
            with contextlib.suppress(OSError):
                self.http.request("DELETE", f"/session/{self.session}")
                self.http.getresponse().read()
        await asyncio.to_thread(self.processes.close)

    def connect(self):
        end = time.monotonic() + START_TIMEOUT
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", self.port), START_TIMEOUT)
                break
            except OSError:
                assert time.monotonic() < end, (self.folder / "log").read_text()
                time.sleep(0.1)
        self.file = self.socket.makefile("rb")
        self.http = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_TIMEOUT)
        if self.engine == "firefox":
            self.receive()

    def receive(self):
        length = b""
        while (byte := self.file.read(1)) != b":":
            length += byte
        return json.loads(self.file.read(int(length)))

    def send(self, name, parameters):
        if self.engine == "firefox":
            frame = json.dumps([0, 1, f"WebDriver:{name}", parameters]).encode()
            self.socket.sendall(b"%d:%s" % (len(frame), frame))
            _, _, error, result = self.receive()
        else:
            path = WEBDRIVER_PATHS[name]
            if self.session:
                path = f"/session/{self.session}{path}"
            self.http.request("POST", path, json.dumps(parameters))
            answer = self.http.getresponse()
            result = json.load(answer)
            error = result if answer.status >= 400 else None
        assert error is None, error
        return result["value"] if set(result) == {"value"} else result

    async def call(self, name, **parameters):
        return await asyncio.to_thread(self.send, name, parameters)

    async def goto(self, url):
        await self.call("Navigate", url=url)

    async def evaluate(self, expression):
        return await self.call("ExecuteScript", script=f"return {expression}", args=[])

    async def set_viewport_size(self, size):
        await self.call("SetWindowRect", **size)

    async def press(self, keys):
        keys = [WEBDRIVER_KEYS.get(key, key) for key in keys.split("+")]
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        await self.call("PerformActions", actions=[{"type": "key", "id": "k", "actions": actions}])

    async def type(self, text):
        for character in text:
            await self.press(character)
