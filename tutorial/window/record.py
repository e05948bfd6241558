"""Make chat.webp, the moving picture in the README, from the real program.

``python tutorial/window/record.py`` takes half a minute. Two people chat in two real browsers,
the chat is killed with ``kill -9`` and started again, and nothing is lost. It needs
requirements-dev.txt and a Chromium (Debian's, or the one that Playwright downloads).
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 500, 430  # pixels of each browser
TERMINAL_HEIGHT = 90  # pixels of the terminal below them
GAP = 4  # pixels between the three
TERMINAL_STYLE = (
    "margin: 0; padding: 12px 16px; background: #15181d; color: #e3e6ea; font: 15px/22px"
)


class Film:
    """Two browsers, a terminal, and the pictures taken of them."""

    def __init__(self, browser):
        size = {"width": WIDTH, "height": HEIGHT}
        self.ann, self.ben = [browser.new_context(viewport=size).new_page() for _ in range(2)]
        size = {"width": 2 * WIDTH + GAP, "height": TERMINAL_HEIGHT}
        self.terminal = browser.new_context(viewport=size).new_page()
        self.frames, self.durations, self.lines = [], [], []

    def shoot(self, seconds):
        """Take a picture that is shown for so many seconds."""
        frame = Image.new("RGB", (2 * WIDTH + GAP, HEIGHT + GAP + TERMINAL_HEIGHT), "#8a94a5")
        places = {self.ann: (0, 0), self.ben: (WIDTH + GAP, 0), self.terminal: (0, HEIGHT + GAP)}
        for page, place in places.items():
            frame.paste(Image.open(io.BytesIO(page.screenshot())), place)
        self.frames.append(frame)
        self.durations.append(int(seconds * 1000))

    def say(self, page, text):
        """Type a message, a few letters in each picture, and send it."""
        for start in range(0, len(text), 4):
            page.keyboard.type(text[start : start + 4])
            self.shoot(0.12)
        page.keyboard.press("Enter")

    def show_command(self, *lines):
        """Show lines in the terminal: the last three."""
        self.lines = [*self.lines, *lines][-3:]
        text = "\n".join(self.lines)
        self.terminal.set_content(f'<pre style="{TERMINAL_STYLE} monospace">{text}</pre>')
        self.terminal.evaluate("document.body.style = 'margin: 0; background: #15181d'")
        self.shoot(1)

    def save(self, path):
        first, *others = self.frames
        options = {"duration": self.durations, "loop": 0, "quality": 75, "method": 6}
        first.save(path, save_all=True, append_images=others, **options)


def start(folder, port="0"):
    """Start the chat, on any free port: its process, and its URL, once it runs."""
    environment = os.environ | {"PORT": port}
    command = [sys.executable, "chat.py"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    sys.exit("The chat did not start.")


def record(film, folder):
    process, url = start(folder)
    for page, name in ((film.ann, "Ann"), (film.ben, "Ben")):
        page.goto(url + "/signup")
        page.get_by_label("Username").fill(name)
        page.get_by_label("Password").fill("correct horse battery")
        page.keyboard.press("Enter")
        expect(page.locator("#online")).to_contain_text(name)
        page.locator("#text").focus()
    film.show_command("$ python chat.py", f"Running on {url}")

    film.say(film.ann, "Hi Ben! What happens to our messages when the server dies?")
    expect(film.ben.locator("#messages li")).to_have_count(1)
    film.shoot(1)
    film.say(film.ben, "Nothing. Try it: kill -9!")
    expect(film.ann.locator("#messages li")).to_have_count(2)
    film.shoot(1.5)

    process.kill()
    process.wait()
    for page in (film.ann, film.ben):
        expect(page.locator("#connection")).to_contain_text("Disconnected")
    film.show_command(f"$ kill -9 {process.pid}")
    film.say(film.ann, "Done. I can still write")
    film.say(film.ben, "So can I: it waits here")
    film.shoot(1.5)

    process, url = start(folder, url.rpartition(":")[2])
    film.show_command("$ python chat.py", f"Running on {url}")
    for page in (film.ann, film.ben):
        expect(page.locator("#messages li")).to_have_count(4, timeout=20_000)
        expect(page.locator("#connection")).to_have_text("")
    film.shoot(2)
    film.say(film.ann, "Nothing lost, nothing twice")
    expect(film.ben.locator("#messages li")).to_have_count(5)
    film.shoot(4)
    process.terminate()
    process.wait()


with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
    for name in ("chat.py", "templates", "static"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, Path(folder) / name)
    path = shutil.which("chromium")
    chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    film = Film(chromium)
    record(film, folder)
    film.save(ROOT / "tutorial" / "chat.webp")
    chromium.close()
