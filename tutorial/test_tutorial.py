"""The tutorial against the code: its links, excerpts, commands and exercises, and its page.

A link into a file with lines has the form  [`name`](../chat.py#L1-L2)  and may be followed by an
excerpt of that definition (a `python` or `js` block). A name that is no definition is a text that
stands in one line of the file. `python tutorial/window/build.py` puts the numbers right.

An `sh` block has commands, and the `text` block right after it what they print; `...` stands for
what varies. An exercise stands in <details>: its `diff` blocks are applied to a copy of the chat,
and its commands run there. In the commands, 8080 is the port of the chat, 8081 that of a second
one, and 8000 that of naive.py. The tests use others instead.
"""

import asyncio
import contextlib
import functools
import http.server
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import build
import faults
import pytest
from browsers import PACKAGES, need_programs
from build import CHAPTERS, CHAT, LINK, PARTS, TEXTS, TUTORIAL, definitions, line_links
from parts import (
    HERE,
    PATIENCE,
    SETTINGS,
    Chat,
    asynchronous,
    becomes_true,
    copy_house,
    has_no_barriers,
    on_pages,
    people,
)
from playwright.async_api import expect

FENCE = re.compile(r"^```([\w -]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
each_text = pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
each_chapter = pytest.mark.parametrize("text", CHAPTERS, ids=lambda text: text.name)
BUILD = "run: python tutorial/window/build.py"

# ---------------------------------------------------------------------------
# The texts
# ---------------------------------------------------------------------------


@each_text
def test_line_links(text):
    for match, name, path, fragment in line_links(text):
        assert match[1] == f"`{name}`", f"{match[1]}: a link with lines is named `so`"
        assert fragment == build.place(path, name), f"{name}: {BUILD}"


def test_every_definition_is_explained():
    links = [link for text in CHAPTERS for link in line_links(text)]
    linked = {name for _, name, path, _ in links if path == CHAT}
    hidden = {name for name in definitions(CHAT) if name.endswith("__")}
    assert definitions(CHAT).keys() - hidden - linked == set()


def pattern(lines):
    """A regular expression for lines; `...` is for what is left out, lines or a part of one."""
    return "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        for line in lines
    )


@each_chapter
def test_excerpts(text):
    for fence in FENCE.finditer(text.read_text()):
        if fence[1] in ("python", "js"):
            suffix = {"python": ".py", "js": ".js"}[fence[1]]
            before = [each for each in line_links(text) if each[0].end() < fence.start()]
            _, name, path, _ = [each for each in before if each[2].suffix == suffix][-1]
            first, last = definitions(path)[name]
            lines = "\n".join(path.read_text().splitlines()[first - 1 : last])
            excerpt = re.compile("^" + pattern(fence[2].splitlines()), re.MULTILINE)
            assert excerpt.search(lines + "\n"), f"{name}: {fence[2]}"


def test_chapters_are_the_sections():
    sections = re.findall(r"^# (\d+)\. (.*)$", CHAT.read_text(), re.MULTILINE)
    heads = [re.match(r"# (\d+)\. (.*)", each.read_text()).groups() for each in CHAPTERS]
    assert sections == heads
    assert [int(each.name[:2]) for each in CHAPTERS] == list(range(1, 11))
    assert [int(number) for number, _ in sections] == list(range(1, 11))


def anchors(markdown):
    """The sections of a text, by their anchors."""
    _, *parts = re.split(r"^#+ (.*)$", FENCE.sub("", markdown), flags=re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in parts[::2]]
    return dict(zip(names, parts[1::2], strict=True))


@each_text
def test_no_dead_links(text):
    for match in LINK.finditer(FENCE.sub("", text.read_text())):
        target, _, fragment = match[2].partition("#")
        if target.startswith(("http:", "https:")):
            continue
        path = (text.parent / target).resolve() if target else text
        assert path.exists(), match[0]
        if fragment and not re.match(r"L\d", fragment):
            assert fragment in anchors(path.read_text()), match[0]


def prose(markdown):
    """What a reader reads as sentences: no code, no headings, no links to what comes later."""
    markdown = re.sub(r"`[^`\n]*`", "", FENCE.sub("", markdown))
    kept = re.sub(
        r"^(#|\*\*The question|Next:|←|\[The tutorial\]).*\n", "", markdown, flags=re.MULTILINE
    )
    return LINK.sub(r"\1", kept)


def test_terms():
    """Each term of terms.md first appears, in bold, where its line says."""
    how_to_read, *texts = [text for text in PARTS if text.name != "terms.md"]
    line = r"^- \*\*(.+?)\*\*: .*\]\(([\w.-]+\.md)#?([^)]*)\)\)?\.?$"
    terms = (TUTORIAL / "terms.md").read_text()
    rows = re.findall(line, terms, re.MULTILINE)
    assert len(rows) == terms.count("\n- ") > 20, (
        "a line has the form: - **term**: ... ([...](...))"
    )
    proses = {text.name: prose(text.read_text()) for text in texts}
    # The table of the chapters has their titles.
    earlier = re.sub(r"^\|.*\n", "", prose(how_to_read.read_text()), flags=re.MULTILINE)
    for term, name, anchor in rows:
        word = rf"(?<![\w-]){re.escape(term)}(s|es)?\b"
        before = earlier + "".join(proses[each] for each in sorted(proses) if each < name)
        assert not re.search(word, before, re.IGNORECASE), f"{term}: used before {name}"
        first = re.search(rf"(\*\*)?{word}(\*\*)?", proses[name], re.IGNORECASE)
        assert first and first[0].startswith("**") and first[0].endswith("**"), f"{term}: {first}"
        section = anchors((TUTORIAL / name).read_text())[anchor] if anchor else proses[name]
        assert f"**{first[0].strip('*')}**" in section, term


def test_repository():
    """A fork's README names the fork: its button deploys that."""
    readme = (HERE / "README.md").read_text()
    named = build.named_repository(readme)
    assert named not in build.name_repository(readme, "ann/fork")
    assert build.repository() in (None, named), f"README.md names another repository; {BUILD}"


def commands(markdown):
    """The `sh` blocks of a text: the kind, the commands, and what they print."""
    fences = list(FENCE.finditer(markdown))
    for fence, after in itertools.zip_longest(fences, fences[1:]):
        if fence[1].startswith("sh"):
            is_output = (
                after and after[1] == "text" and not markdown[fence.end() : after.start()].strip()
            )
            yield fence[1], fence[2], after[2] if is_output else ""


@each_text
def test_commands_can_be_pasted(text):
    """In zsh, too, where a # begins no comment, and an exclamation mark recalls a command."""
    for _, block, _ in commands(text.read_text()):
        assert not re.search(r"(^|\s)#|(?<!\$)!|^[$>] ", block, re.MULTILINE), block
        for shell in filter(shutil.which, ("bash", "zsh")):
            subprocess.run([shell, "-n", "-c", block], check=True)


def run_commands(blocks, folder):
    """Run `sh` blocks beside a chat (and naive.py): do they print what is shown?"""
    env = {name: os.environ[name] for name in os.environ.keys() - SETTINGS}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    naive = Chat(folder, [sys.executable, "-u", "tutorial/scripts/naive.py", "0"])
    with contextlib.ExitStack() as stack, Chat(folder) as chat:
        env["PORT"] = chat.env["PORT"]
        ports = {"8080": chat.env["PORT"], "8081": str(faults.free_port())}
        if any("8000" in block for block, _ in blocks):
            stack.callback(naive.start().kill)  # it may leave tracebacks
            ports["8000"] = naive.env["PORT"]
        for block, shown in blocks:
            command = re.sub("|".join(ports), lambda port: ports[port[0]], block)
            with (folder / "output").open("w") as output:
                process = subprocess.Popen(
                    ["bash", "-c", command],
                    cwd=folder,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                stack.callback(end_group, process)
                process.wait(3 * PATIENCE)
            lines = (folder / "output").read_text().splitlines()
            printed = "".join(f"{line.rstrip()}\n" for line in lines)
            for told, real in ports.items():
                printed = printed.replace(real, told)
            same = re.fullmatch(pattern(shown.splitlines()), printed)
            assert same, f"{block}\n{printed}"


def end_group(process):
    """End what a command has left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def apply_diffs(markdown, folder):
    """Apply `diff` blocks. What stays and what goes must stand exactly once in the file."""
    for fence in FENCE.finditer(markdown):
        if fence[1] == "diff":
            lines = fence[2].splitlines(keepends=True)
            head = lines.pop(0)[4:].strip() if lines[0].startswith("--- ") else "chat.py"
            old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            source = "\n" + (folder / head).read_text()
            assert source.count("\n" + old) == 1, f"{head}:\n{old}"
            (folder / head).write_text(source.replace("\n" + old, "\n" + new)[1:])


@pytest.mark.parametrize("part", ["chapter", "exercise"])
@each_chapter
def test_commands(request, tmp_path, text, part):
    """What a chapter's commands print is what it shows; and so it is after its exercise."""
    pieces = re.split(r"</?details>", text.read_text())
    markdown = "".join(pieces[1::2] if part == "exercise" else pieces[::2])
    # "sh by-hand": this one is for people. For example, it goes on running.
    blocks = [(block, shown) for kind, block, shown in commands(markdown) if kind == "sh"]
    assert blocks or part == "chapter" or not markdown, (
        "an exercise has a command that shows its effect"
    )
    if not blocks:
        return
    needed = re.findall(rf"\b(?:{'|'.join(PACKAGES)})\b", "\n".join(block for block, _ in blocks))
    need_programs(request, "bash", *needed)
    house = copy_house(tmp_path)
    shutil.copytree(TUTORIAL / "scripts", house / "tutorial" / "scripts")
    # A client that reads nothing is disconnected after 40 seconds: here after 6.
    source = (house / "chat.py").read_text()
    assert source.count("HEARTBEAT = 27 ") == 1
    (house / "chat.py").write_text(source.replace("HEARTBEAT = 27 ", "HEARTBEAT = 4 "))
    apply_diffs(markdown, house)
    run_commands(blocks, house)


SCRIPT = "<img src=x onerror=alert(1)>"


@on_pages
async def test_flaws_of_the_naive_chat(chromium):
    """The flaws of naive.py that no command of chapter 1 shows."""
    naive = Chat(command=[sys.executable, "-u", "tutorial/scripts/naive.py", "0"])
    other = Chat(command=naive.command)
    async with naive, other:
        ann, ben, cleo = [await chromium.new_page() for _ in range(3)]
        boxes = []
        for page, url in ((ann, naive.url), (ben, naive.url), (cleo, other.url)):
            page.on("dialog", lambda box: (boxes.append(box.message), box.dismiss())[1])
            await page.goto(url)

        async def write(page, user, text):
            await page.locator("#user").fill(user)
            await page.locator("#text").fill(text)
            await page.get_by_role("button").click()
            await expect(page.locator("#text")).to_have_value("")  # as if it had been sent

        await write(ann, "Ben", "It is me, Ben.")  # nobody knows who writes
        await expect(ben.locator("p")).to_have_text("Ben: It is me, Ben.")
        await write(ann, "Ann", SCRIPT)  # a script in a message runs
        async with asyncio.timeout(PATIENCE):
            while boxes != ["1", "1"]:
                await asyncio.sleep(0.05)
        await write(cleo, "Cleo", "Hello?")  # a second process is a second chat
        await expect(cleo.locator("p")).to_have_text("Cleo: Hello?")
        await ben.reload()
        await expect(ben.locator("p")).to_have_count(2)
        assert await naive.end(signal.SIGINT, PATIENCE) == 0
        await write(ann, "Ann", "lost")  # a lost connection loses a message
        naive.command = [*naive.command[:-1], naive.env["PORT"]]
        await asyncio.to_thread(naive.start)
        await ben.reload()  # a restart forgets everything
        await write(ben, "Ben", "Is anybody here?")
        await expect(ben.locator("p")).to_have_text("Ben: Is anybody here?")


@asynchronous
async def test_who_writes_and_what(tmp_path):
    """Flaws six and seven of naive.py: chat.py has neither."""
    async with Chat(copy_house(tmp_path)) as chat, people(chat, None, None) as (ann, ben):
        await asyncio.gather(ann.connect("new"), ben.connect("new"))
        await ann.ws.send_json({"user": ben.login, "text": SCRIPT})
        await ben.until(lambda: ben.seen)
        assert [(each["user"], each["text"]) for each in ben.seen] == [(ann.login, SCRIPT)]
        page = await (await ben.ask("/")).text()
        assert "<img" not in page and "&lt;img src=x" in page


# ---------------------------------------------------------------------------
# The tutorial in one window
# ---------------------------------------------------------------------------

READER = TUTORIAL / "index.html"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "reduced_motion": "reduce"}
DESKTOP = {"viewport": {"width": 1440, "height": 900}, "reduced_motion": "reduce"}


@contextlib.contextmanager
def web_server():
    """Any web server: it knows nothing of the page. The URL of the page."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=TUTORIAL)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextlib.asynccontextmanager
async def reader(it, url, **options):
    """The page. It must not complain about anything, nor ask for anything but itself."""
    context = await it.new_context(**options)
    page = await context.new_page()
    complaints = []
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("console", lambda line: complaints.append(line.text))
    own = url.partition("#")[0]
    context.on("request", lambda each: each.url == own or complaints.append(each.url))
    await page.goto(url)
    yield page
    assert complaints == []
    await context.close()


def test_reader_is_up_to_date():
    page = build.page()
    is_up_to_date = page == READER.read_text()  # pytest would show 300 KB of differences
    assert is_up_to_date, BUILD
    assert len(page.encode()) <= 350_000


@each_text
def test_github_can_publish(text):
    """GitHub Pages takes Markdown for a template, and `{%` for a tag, if it is not called raw."""
    rest = re.sub(r"{% raw %}.*?{% endraw %}", "", text.read_text(), flags=re.DOTALL)
    assert "{%" not in rest and "{{" not in rest


DEAD_LINKS = """[...document.querySelectorAll("a[href^='#']")].map((link) => link.hash.slice(1))
  .filter((id) => document.querySelectorAll(`[id="${decodeURIComponent(id)}"]`).length !== 1)"""
# Follows each link into the code. Tells what is marked, whether it is in view (as much of it as
# there is room for, and nothing covers its first line), and whether the focus has gone along.
FOLLOW_ALL = """[...document.querySelectorAll("main a.to-code")].map((link) => {
  link.click();
  const marked = document.querySelectorAll(".marked"), lines = marked[0];
  const box = lines.getBoundingClientRect();
  const view = document.getElementById("files").getBoundingClientRect();
  const seen = Math.min(box.bottom, view.bottom) - box.top;
  const top = document.elementFromPoint(view.left + 80, box.top + 5);
  return {
    target: link.hash.slice(1),
    text: lines.textContent,
    good: marked.length === 1 && lines.contains(top) && seen >= Math.min(box.height, view.height / 2)
      && document.activeElement === lines && link.ariaCurrent === "true",
  };
})"""


@on_pages
@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["file, desktop", "http, phone"])
async def test_reader_links(chromium, options):
    """Each link brings its very lines into view. And the code can be copied as it is."""
    with web_server() as url:
        async with reader(
            chromium, READER.as_uri() if options is DESKTOP else url, **options
        ) as page:
            assert await page.evaluate(DEAD_LINKS) == []
            links = await page.evaluate(FOLLOW_ALL)
            assert [link["target"] for link in links if not link["good"]] == []
            for link in links:
                name, _, fragment = link["target"].partition(":")
                if numbers := [int(number) for number in re.findall(r"\d+", fragment)]:
                    lines = (HERE / name).read_text().splitlines(keepends=True)
                    assert link["text"] == "".join(lines[numbers[0] - 1 : numbers[-1]]), link
            wanted = {
                f"{path.relative_to(HERE)}:{fragment}"
                for text in PARTS
                for _, _, path, fragment in line_links(text)
                if path.name != "test_chat.py"
            }
            assert wanted <= {link["target"] for link in links}
            for name in ("chat.py", "static/chat.js"):
                copied = await page.evaluate(
                    """(name) => {
                      getSelection().selectAllChildren(document.getElementById(name).lastChild);
                      return getSelection().toString();
                    }""",
                    name,
                )
                assert copied.rstrip() == (HERE / name).read_text().rstrip()


async def click_when_still(page, link):
    """Click when the page has noticed where it was scrolled: else it takes this for a reader's."""
    await link.scroll_into_view_if_needed()
    await becomes_true(page, "history.state?.text === document.querySelector('main').scrollTop")
    await link.click()


@on_pages
async def test_reader_desktop(chromium):
    """Keyboard, history, memory: the text leads the code, and the code leads back."""
    with web_server() as url:
        async with reader(chromium, url, **DESKTOP) as page:
            marked, focused = page.locator(".marked"), page.locator(":focus")
            links = page.locator("[id='06-databases'] p > .to-code")
            first, second = [await links.nth(number).get_attribute("href") for number in (1, 2)]
            await links.nth(1).focus()
            await page.keyboard.press("Enter")
            await expect(focused).to_have_id(first[1:])
            await click_when_still(page, links.nth(2))
            await expect(marked).to_have_id(second[1:])
            # Back and forward, from one place in the code to another.
            await page.go_back()
            await expect(marked).to_have_id(first[1:])
            await expect(marked).to_be_in_viewport()
            await expect(page).to_have_url(url + first)
            await page.go_forward()
            await expect(marked).to_have_id(second[1:])
            await expect(focused).to_have_id(second[1:])
            # Escape leads to the link, and a link in the code to every place that explains it.
            await page.keyboard.press("Escape")
            await expect(links.nth(2)).to_be_focused()
            # That marks its own lines, and does not move the code.
            back, code = page.locator(f"[id='{first[1:]}'] .back").last, "pane.scrollTop"
            explained = (await back.get_attribute("href"))[1:]
            await back.scroll_into_view_if_needed()
            before = await page.evaluate(code)
            await back.click()
            await expect(focused).to_have_id(explained)
            await expect(focused).to_be_in_viewport()
            assert await focused.get_attribute("href") == first
            await expect(marked).to_have_id(first[1:])
            assert await page.evaluate(code) == before
            # The two tables of contents. The history knows where the text was.
            text = "document.querySelector('main').scrollTop"
            before = await page.evaluate(text)
            for menu, title in (("Contents of the code", "8."), ("Chapters", "7.")):
                await page.get_by_role("button", name=menu).click()
                await page.get_by_role("navigation", name=menu).get_by_text(title).click()
                await expect(page.get_by_role("button", name=menu)).to_contain_text(title)
            await expect(page.locator("article[id^='07']")).to_be_focused()
            await expect(marked).to_contain_text("# 7.")  # the code has come along
            await page.go_back()
            await becomes_true(page, f"{text} === {before}")
            await expect(marked).to_contain_text("# 8.")
            await page.go_forward()
            await expect(page.locator("article[id^='07'] h1")).to_be_in_viewport()
            # When the text is scrolled, the code follows. Its end is read, and that is remembered.
            await page.mouse.move(300, 500)
            await page.mouse.wheel(0, 900)
            await expect(marked).not_to_contain_text("# 7.")
            await expect(marked).to_be_in_viewport()
            await page.locator("article[id^='07']").evaluate("each => each.scrollIntoView(false)")
            await expect(page.locator("nav a.read")).to_contain_text("7.")
            await expect(marked).to_have_count(0)  # its last sections explain no code
            # Lines that were chosen stay marked when the text moves a bit.
            chosen = (await links.nth(6).get_attribute("href"))[1:]
            await click_when_still(page, links.nth(6))
            await becomes_true(page, f"history.state.text === {text}")
            before = await page.evaluate(text)
            await page.mouse.wheel(0, 20)
            await becomes_true(page, f"{text} === {before} + 20 && history.state.text === {text}")
            await expect(marked).to_have_id(chosen)
            # A narrow window shows the same paragraph, and so does the wide one after it.
            heading = await page.evaluate("localStorage['tutorial-heading']")
            for width in (820, 1440):
                await page.set_viewport_size({"width": width, "height": 900})
                await expect(links.nth(6)).to_be_in_viewport()
                await becomes_true(page, "history.state.text === scroller().scrollTop")
                assert await page.evaluate("localStorage['tutorial-heading']") == heading
            await page.get_by_role("separator").press("ArrowLeft")
            width = await page.get_by_role("separator").get_attribute("aria-valuenow")
            await becomes_true(page, f"history.state.text === {text}")
            before = await page.evaluate(text)
            id = await marked.get_attribute("id")
            await page.reload()
            await expect(marked).to_have_id(id)
            await expect(page.locator("nav a.read")).to_have_count(1)
            assert await page.evaluate(text) == before
            await expect(page.get_by_role("separator")).to_have_attribute("aria-valuenow", width)
            # Commands can be copied.
            await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
            block = page.locator(".block.sh").first
            await block.get_by_role("button").click()
            copied = await page.evaluate("navigator.clipboard.readText()")
            assert copied == await block.locator("pre").text_content()
            await has_no_barriers(page, ["dark"], "{exclude: ['section + section']}")


@on_pages
async def test_reader_and_what_it_does_not_expect(chromium):
    """An odd address, foreign values in the storage and a refused clipboard break nothing."""
    with web_server() as url:
        async with reader(chromium, url) as page:
            for stored in ("{}", "7", "nonsense"):
                for name in "read", "heading", "width":
                    await page.evaluate(f"localStorage['tutorial-{name}'] = {stored!r}")
                await page.goto("about:blank")
                await page.goto(url)
                await expect(page.locator(".copy")).not_to_have_count(0)
            block = page.locator(".block.sh").first
            refuse = "navigator.clipboard.writeText = () => Promise.reject()"
            await page.evaluate(f"void ({refuse})")
            await block.get_by_role("button").click()
            await expect(block.get_by_role("button")).to_have_text("Press Ctrl+C")
            selected = await page.evaluate("getSelection().toString()")
            assert selected.strip() == (await block.locator("pre").text_content()).strip()
        async with reader(chromium, url + "#100%") as page:
            await expect(page.locator(".copy")).not_to_have_count(0)


@on_pages
async def test_reader_phone(chromium):
    """The code is a sheet over the text."""
    async with reader(chromium, READER.as_uri(), **PHONE) as page:
        code, links = page.get_by_role("complementary"), page.locator("main .to-code")
        await expect(code).to_be_hidden()
        await links.nth(3).tap()
        await expect(page.locator(".marked")).to_be_in_viewport()
        await has_no_barriers(page, ["light"], "{exclude: ['pre', 'article:nth-of-type(n+4)']}")
        await page.keyboard.press("Escape")
        await expect(code).to_be_hidden()
        await expect(links.nth(3)).to_be_focused()
        await page.get_by_role("button", name="Code").tap()
        await expect(page.locator(".marked")).to_be_in_viewport()
        await page.go_back()
        await expect(code).to_be_hidden()
        for width in (390, 320):
            await page.set_viewport_size({"width": width, "height": 600})
            assert not await page.evaluate("document.documentElement.scrollWidth > innerWidth")


@on_pages
async def test_reader_without_javascript(chromium):
    """First the text, then the code."""
    async with reader(chromium, READER.as_uri(), **DESKTOP, java_script_enabled=False) as page:
        parts = await page.locator("article, #files section").all()
        tops = [(await part.bounding_box())["y"] for part in parts]
        assert tops == sorted(tops) and len(set(tops)) == len(parts) > 11
        link = page.locator("main .to-code").nth(3)
        await link.click()
        target = page.locator(f"[id='{(await link.get_attribute('href'))[1:]}']")
        await expect(target).to_be_in_viewport()
        await page.go_back()
        await expect(link).to_be_in_viewport()
