"""Make ``tutorial/index.html``: the chapters and the code side by side, in one file.

It reads the chapters, the files that they link to, and ``reader.html``, ``reader.css`` and
``reader.js``. The same files always make the same page.
"""

import re
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
ROOT = HERE.parent
CHAT = ROOT / "chat.py"
README = HERE / "README.md"
CHAPTERS = [README, *sorted(path for path in HERE.glob("*.md") if path != README)]
# A link to one of these shows the file beside the text. Any other link stays as it is.
SOURCES = [CHAT, *ROOT.glob("static/chat.*"), *ROOT.glob("templates/*"), *HERE.glob("*.py")]
LANGUAGES = {".py": "python", ".js": "javascript", ".css": "css", ".html": "html+jinja"}

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
        path = (HERE / target).resolve()
        if path in SOURCES or path in CHAPTERS:
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
    file = path.stem if path in CHAPTERS else path.relative_to(ROOT).as_posix()
    return f"{file}:{part}" if part else file


def figure(image: Token) -> str:
    """An SVG becomes a part of the page. Its text stands in the chapter, not in its title."""
    source, text = image.attrs["src"], escape(image.content)
    if not source.endswith(".svg"):
        return f'<a href="{source}">{text}</a>'
    svg = re.sub("<title.*?</title>", "", (HERE / source).read_text())
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
    return re.sub("</?span.*?>", "", html).removesuffix("\n").split("\n")


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


def entry(id: str, title: str, parts: Iterable[tuple[str, str]] = ()) -> str:
    """An entry of a table of contents, with those of its parts."""
    inner = "".join(entry(*part) for part in parts)
    return f'<li><a href="#{id}">{escape(title)}</a>{inner and f"<ol>{inner}</ol>"}</li>\n'


def main() -> None:
    files: Files = defaultdict(lambda: defaultdict(dict), {CHAT: defaultdict(dict)})
    chapters = [Chapter(path, files) for path in CHAPTERS]
    parts = [(anchor(CHAT, each.banner), each.headings[0][1]) for each in chapters if each.banner]
    parts += [(anchor(path), anchor(path)) for path in files if path != CHAT]
    text = "".join(each.html for each in chapters)
    # The figures have the same styles. Once is enough, and only inside of figures.
    figure_styles = set(re.findall("<style>(.*?)</style>", text, re.DOTALL))
    text = re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
    style = (HERE / "reader.css").read_text() + f".figure {{ {' '.join(sorted(figure_styles))} }}"
    page = Template((HERE / "reader.html").read_text()).substitute(
        icon=quote((ROOT / "static" / "icon.svg").read_text()),
        style=style,
        script=(HERE / "reader.js").read_text(),
        chapters="".join(entry(*each.headings[0], each.headings[1:]) for each in chapters),
        text=text,
        contents="".join(entry(*each) for each in parts),
        code="".join(section(*each) for each in files.items()),
    )
    (HERE / "index.html").write_text(page)


if __name__ == "__main__":
    main()
