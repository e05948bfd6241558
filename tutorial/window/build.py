"""Put the line numbers of the tutorial's links right, and make ``tutorial/index.html``.

That page shows the chapters and the code side by side, in one file. It is made from the chapters,
the files that they link to, and ``reader.html``, ``reader.css`` and ``reader.js``. The same files
always make the same page. In a repository on GitHub, its name is filled in in ``README.md``, too.
"""

import ast
import contextlib
import functools
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from html import escape
from itertools import count
from pathlib import Path
from string import Template
from textwrap import dedent
from urllib.parse import quote

import pygments
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

HERE = Path(__file__).resolve().parent
TUTORIAL = HERE.parent
ROOT = TUTORIAL.parent
CHAT = ROOT / "chat.py"
CHAPTERS = sorted(TUTORIAL.glob("[0-9]*.md"))  # each explains a section of chat.py
# What the page shows, in this order.
PARTS = [TUTORIAL / "README.md", *CHAPTERS]
PARTS += [TUTORIAL / "how-it-is-tested.md", TUTORIAL / "terms.md"]
TEXTS = [ROOT / "README.md", *PARTS]
# A link to one of these shows the file beside the text. Any other link stays as it is.
SOURCES = [CHAT, *ROOT.glob("static/chat.*"), *ROOT.glob("templates/*")]
SOURCES += TUTORIAL.glob("scripts/*.py")
LANGUAGES = {".py": "python", ".js": "javascript", ".css": "css", ".html": "html+jinja"}

LINK = re.compile(r"!?\[([^\]\n]*)\]\(([^)\s]+)\)")


# ---- The line numbers


@functools.cache
def definitions(path: Path) -> dict[str, tuple[int, int]]:
    """The first and last line of each definition in a Python or JavaScript file, by its name."""
    source = path.read_text()
    found = {}
    if path.suffix != ".py":
        pattern = r"^( *)(?:async )?function (\w+).*?^\1}$"
        for match in re.finditer(pattern, source, re.MULTILINE | re.DOTALL):
            first = source.count("\n", 0, match.start()) + 1
            found[match[2]] = first, first + match[0].count("\n")
        return found
    tree = ast.parse(source)
    for parent in (tree, *(each for each in tree.body if isinstance(each, ast.ClassDef))):
        prefix = f"{parent.name}." if isinstance(parent, ast.ClassDef) else ""
        for each in parent.body:
            if isinstance(each, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([each.lineno, *(one.lineno for one in each.decorator_list)])
                found[prefix + each.name] = first, each.end_lineno or first
            elif isinstance(each, (ast.Assign, ast.AnnAssign)) and not prefix:
                for target in getattr(each, "targets", None) or [each.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            found[name.id] = each.lineno, each.end_lineno or each.lineno
    return found


def place(path: Path, name: str) -> str:
    """The fragment that a link to a name in a file must have. A name may be any text of a line."""
    if name in definitions(path):
        first, last = definitions(path)[name]
        return f"L{first}-L{last}" if last > first else f"L{first}"
    lines = path.read_text().splitlines()
    [line] = [number for number, line in enumerate(lines, 1) if name in line]
    return f"L{line}"


def line_links(text: Path) -> Iterator[tuple[re.Match[str], str, Path, str]]:
    """Each link of a text into a file with lines: the match, its name, path and fragment."""
    for match in LINK.finditer(text.read_text()):
        target, _, fragment = match[2].partition("#")
        if re.match(r"L\d", fragment) and not target.startswith("http"):
            yield match, match[1].strip("`"), (text.parent / target).resolve(), fragment


def put_right(text: Path) -> None:
    """Put the line numbers of a text right. A name that is nowhere is left to the tests."""
    old = new = text.read_text()
    for match, name, path, fragment in line_links(text):
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            new = new.replace(match[0], match[0].replace(f"#{fragment})", f"#{place(path, name)})"))
    if new != old:
        text.write_text(new)
        print(f"{text.relative_to(ROOT)}: line numbers put right")


# ---- The name of the repository


def repository() -> str | None:
    """OWNER/REPO of the repository on GitHub that this folder was cloned from, if there is one."""
    command = ["git", "--git-dir", ROOT / ".git", "remote", "get-url", "origin"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        url = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if match := re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", url.strip()):
            return match[1]
    return None


def named_repository(readme: str) -> str:
    """The one that README.md names, in the link of its button."""
    match = re.search(r"template=https://github\.com/([\w.-]+/[\w.-]+)", readme)
    assert match, "README.md has no Deploy button"
    return match[1]


def name_repository(readme: str, new: str) -> str:
    """README.md with the name of another repository."""
    old = named_repository(readme)
    for url in ("github.com/{}/{}", "https://{}.github.io/{}/"):
        readme = readme.replace(url.format(*old.split("/")), url.format(*new.split("/")))
    return readme


# ---- The page

# For each file: the fragments that name its lines (L12-L34) and, for each of them, one link back
# to each chapter that mentions them. The files come in the order of the text, but chat.py first.
Files = dict[Path, dict[str, dict[str, str]]]

references = count(1)  # the numbers of the links into the code


class Chapter:
    """A chapter as HTML. Its links into the code are added to `files`."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self.files = files
        text = path.read_text()
        title = text.partition("\n")[0]
        self.headings = [(anchor(path), title[2:])]  # the id and text of each
        # A section of chat.py has the same title, in the second line of a banner of three lines.
        self.banner = ""
        lines = CHAT.read_text().splitlines()
        if title in lines:
            number = lines.index(title) + 1
            self.banner = f"L{number - 1}-L{number + 1}"
            link = f"[This section of `chat.py`](../chat.py#{self.banner})"
            text = text.replace(title, f"{title}\n\n{link}", 1)
        self.html = f'<article id="{anchor(path)}">\n{self.render(text)}</article>\n'

    def render(self, text: str) -> str:
        """Render the Markdown. Some of its tokens are changed before."""
        markdown = MarkdownIt("commonmark").enable("table")
        tokens = markdown.parse(text)
        for index, token in enumerate(tokens):
            if token.type == "heading_open" and token.tag != "h1":
                # Git hosts make the id of a heading in the same way.
                heading = "".join(child.content for child in tokens[index + 1].children)
                slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                token.attrs["id"] = anchor(self.path, slug)
                self.headings.append((token.attrs["id"], heading))
            elif token.type == "fence":
                token.type, token.content = "html_block", block(token.info, token.content)
            for child in token.children or []:
                if child.type == "link_open":
                    self.lead_link(child)
                elif child.type == "image":
                    child.type, child.content = "html_inline", figure(child)
        return markdown.renderer.render(tokens, markdown.options, {})

    def lead_link(self, token: Token) -> None:
        """Lead a link to a chapter, or into the code, to its place in the page."""
        target, _, fragment = token.attrs["href"].partition("#")
        path = (self.path.parent / target).resolve()
        if path in SOURCES or path in PARTS:
            token.attrs["href"] = "#" + anchor(path, fragment)
        if path in SOURCES:
            token.attrs["class"] = "to-code"
            token.attrs["id"] = f"ref-{next(references)}"
            # The way back. The style sheet makes it show the number of the chapter.
            title, number = escape(self.headings[-1][1]), self.headings[0][1].partition(".")[0]
            self.files[path][fragment].setdefault(
                number,
                f'<a class="back" href="#{token.attrs["id"]}" title="{title}" data-in="{number}"></a>',
            )


def anchor(path: Path, part: str = "") -> str:
    """The id of a file in the page, or of a part of it: 06-databases, static/chat.js:L27."""
    file = path.stem if path in PARTS else path.relative_to(ROOT).as_posix()
    return f"{file}:{part}" if part else file


def figure(image: Token) -> str:
    """An SVG becomes a part of the page. Its text stands in the chapter, not in its title."""
    source, text = image.attrs["src"], escape(image.content)
    if not source.endswith(".svg"):
        return f'<a href="{source}">{text}</a>'
    svg = re.sub("<title.*?</title>", "", (TUTORIAL / source).read_text())
    svg = re.sub('aria-labelledby=".*?"', f'aria-label="{text}"', svg)
    return f'<span class="figure">{svg}</span>'


def block(info: str, source: str) -> str:
    """A code block of a chapter. The lines of a command are elements, so they can be indented."""
    language = info.partition(" ")[0]
    lines = source.splitlines()
    if language == "diff":
        html = "".join(diff(lines))
    elif language == "sh":
        html = "".join(f"<kbd>{escape(line, quote=False)}\n</kbd>" for line in lines)
    elif language in ("python", "js", "css", "html"):
        html = "\n".join(highlight(dedent(source).splitlines(), language))
    else:
        html = escape(source.rstrip(), quote=False)
    return f'<div class="block {language}"><pre>{html}</pre></div>\n'


def highlight(lines: list[str], language: str) -> list[str]:
    """Lines of code as HTML. Pygments gives each kind of token a class: k for keywords."""
    lexer = get_lexer_by_name(language, stripnl=False)
    html = pygments.highlight("\n".join(lines), lexer, HtmlFormatter(nowrap=True))
    # Few kinds have a colour in reader.css. For the others, an element would only take room.
    html = re.sub(r'<span class="(c|k|sd?|n[cdft])\w*">(.*?)</span>', r"<b class=\1>\2</b>", html)
    html = re.sub("</?span.*?>", "", html)
    # Neighbours of the same kind, such as the parts of an f-string, become one element.
    neighbours = re.compile(r"(<b class=(\w+)>[^<\n]*)</b>( ?)<b class=\2>")
    while neighbours.search(html):
        html = neighbours.sub(r"\1\3", html)
    return html.removesuffix("\n").split("\n")


def diff(lines: list[str]) -> Iterator[str]:
    """What goes and what comes. A first line such as ``--- static/chat.css`` names the file."""
    language = "python"
    if lines[0].startswith("--- "):
        language = LANGUAGES[Path(lines[0]).suffix]
        yield f"<samp>{escape(lines.pop(0))}\n</samp>"
    code = highlight([line[1:] for line in lines], language)
    for line, html in zip(lines, code, strict=True):
        tag = {"+": "ins", "-": "del"}.get(line[:1], "span")
        yield f"<{tag}>{html}\n</{tag}>"


def section(path: Path, links: dict[str, dict[str, str]]) -> str:
    """A file as HTML. Lines that the text explains become an element, with links back to it."""
    lines = highlight(path.read_text().splitlines(), LANGUAGES[path.suffix])
    to_file = "".join(links.pop("", {}).values())
    extents = {each: [int(number) for number in re.findall(r"\d+", each)] for each in links}
    begins, backs, ends = defaultdict(str), defaultdict(str), defaultdict(str)
    # Elements are nested: of those that begin in the same line, the longest must come first.
    for part in sorted(links, key=lambda part: -extents[part][-1]):
        first, last = extents[part][0], extents[part][-1]
        begins[first] += f'<span class="lines" id="{anchor(path, part)}">'
        backs[first] += "".join(links[part].values())
        ends[last] += "</span>"
    # Each <i> is the margin of a line. It shows the number: the style sheet counts them.
    html = "".join(
        f"{begins[number]}<i>{backs[number]}</i>{line}\n{ends[number]}"
        for number, line in enumerate(lines, 1)
    )
    name = anchor(path)
    return f'<section id="{name}"><h2>{name}{to_file}</h2><pre>{html}</pre></section>\n'


def entry(id: str, title: str, parts: Iterable[tuple[str, str]] = (), minutes: str = "") -> str:
    """An entry of a table of contents, with those of its parts, and how long a chapter takes."""
    inner = "".join(entry(*part) for part in parts)
    time = minutes and f" <small>{minutes} min</small>"
    return f'<li><a href="#{id}">{escape(title)}{time}</a>{inner and f"<ol>{inner}</ol>"}</li>\n'


def page() -> str:
    """The page: all of its HTML."""
    files: Files = defaultdict(lambda: defaultdict(dict), {CHAT: defaultdict(dict)})
    chapters = [Chapter(path, files) for path in PARTS]
    parts = [(anchor(CHAT, each.banner), each.headings[0][1]) for each in chapters if each.banner]
    parts += [(anchor(path), anchor(path)) for path in files if path != CHAT]
    minutes = dict(re.findall(r"\((\S+)\.md\) \| (\d+)", (TUTORIAL / "README.md").read_text()))
    menu = "".join(
        entry(*each.headings[0], each.headings[1:], minutes.get(each.headings[0][0], ""))
        for each in chapters
    )
    text = "".join(each.html for each in chapters)
    # The figures have the same styles. Once is enough, and only inside of figures.
    figure_styles = set(re.findall("<style>(.*?)</style>", text, re.DOTALL))
    text = re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
    style = (HERE / "reader.css").read_text() + f".figure {{ {' '.join(sorted(figure_styles))} }}"
    return Template((HERE / "reader.html").read_text()).substitute(
        icon=quote((ROOT / "static" / "icon.svg").read_text()),
        style=style,
        script=(HERE / "reader.js").read_text(),
        chapters=menu,
        text=text,
        contents="".join(entry(*each) for each in parts),
        code="".join(section(*each) for each in files.items()),
    )


def main() -> None:
    readme = ROOT / "README.md"
    if name := repository():
        readme.write_text(name_repository(readme.read_text(), name))
    for text in TEXTS:
        put_right(text)
    (TUTORIAL / "index.html").write_text(page())


if __name__ == "__main__":
    main()
