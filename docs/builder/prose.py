r"""Prose: Markdown with mathematics goes in, and HTML that needs no network comes out.

Formulas become MathML, which browsers draw themselves. Code is coloured. Each name of the package in it is a link to
its definition, and so is a name between backticks in the prose.
"""

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments.lexers import BashLexer, PythonLexer, TextLexer, YamlLexer
from pygments.token import STANDARD_TYPES, Comment, Name, Operator, String, _TokenType

LEXERS = {"python": PythonLexer, "py": PythonLexer, "bash": BashLexer, "sh": BashLexer, "yaml": YamlLexer}
WIDE = 40
"""A formula in a line with more letters of LaTeX than this may be wider than a phone."""


@dataclass
class Place:
    """What a page can link to.

    `names` are the names in scope, and `known` those of the whole package, each with the address of its definition.
    `link` turns an address in the sources into one on the site.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)
    link: Callable[[str], str] = lambda address: address


def formula(latex: str, *, block: bool) -> str:
    """LaTeX to MathML, in a box that scrolls if the formula is wider than the column."""
    mathml = convert(latex.strip(), display="block" if block else "inline")
    mathml = mathml.replace('<mspace width="negativethinmathspace" />', "")
    mathml = mathml.replace("<mo>&#x0007C;</mo>", '<mo stretchy="false" lspace="0" rspace="0">|</mo>')
    mathml = re.sub(r"<m[io]>(ln|log|exp|min|max)</m[io]>", r"<mi>\1</mi>", mathml)
    mathml = re.sub(  # The name of a function needs a space before its argument.
        r"(<mi>(?:ln|log|exp|min|max)</mi>)(?=<m(?:i|n|sub|sup|frac)>)", r'\1<mspace width="0.17em"/>', mathml
    )
    if block:
        return f'<div class="formula" tabindex="0">{mathml}</div>\n'
    return f'<span class="wide">{mathml}</span>' if len(latex) > WIDE else mathml


def anchor(heading: str) -> str:
    """The id of a heading, derived from its text as GitHub does it."""
    words = re.sub(r"[^\w\s-]", "", re.sub(r"<[^>]+>|\$[^$]*\$", "", heading).lower())
    return re.sub(r"\s", "-", words.strip())


def code(source: str, language: str, place: Place) -> str:
    """Source text to coloured HTML with links, without the `<pre>` around it."""
    pieces: list[str] = []
    before = ""
    tokens = LEXERS.get(language, TextLexer)(stripnl=False).get_tokens(source)
    for kind, text in tokens:
        address = None
        if kind in Name and kind not in Name.Builtin.Pseudo:
            owner = re.search(r"(\w+)\.$", before)
            if owner:
                address = place.names.get(f"{owner[1]}.{text}")
            elif not before.endswith("."):
                address = place.names.get(text)
        piece = html.escape(text, quote=False)
        name = _css_class(kind)
        piece = f'<span class="{name}">{piece}</span>' if name and text.strip() else piece
        pieces.append(f'<a href="{address}">{piece}</a>' if address else piece)
        before = "" if kind in Comment or kind in String else (before + text)[-80:]
    return "".join(pieces).rstrip("\n")


def _css_class(kind: _TokenType) -> str:
    while kind not in STANDARD_TYPES:
        kind = kind.parent
    return "" if kind in (Name, Operator) else STANDARD_TYPES[kind]


def render(text: str, place: Place, *, level: int = 0) -> str:
    """Markdown to HTML.

    Args:
        level: how many levels headings move down, on a page that already has a heading.
    """
    md = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    dollarmath_plugin(
        md, allow_space=False, allow_digits=True, renderer=lambda latex, how: formula(latex, block=how["display_mode"])
    )
    md.renderer.rules["math_block"] = lambda tokens, i, *_: formula(tokens[i].content, block=True)
    md.renderer.rules["math_inline"] = lambda tokens, i, *_: formula(tokens[i].content, block=False)
    md.renderer.rules["math_inline_double"] = lambda tokens, i, *_: formula(tokens[i].content, block=True)
    tokens = md.parse(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    for i, token in enumerate(tokens):
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + level)}"
        if token.type == "heading_open":
            token.attrSet("id", anchor(tokens[i + 1].content))
        _link(token, place)
    md.renderer.rules["fence"] = lambda tokens, i, *_: listing(tokens[i].content, tokens[i].info.strip(), place)
    md.renderer.rules["code_block"] = lambda tokens, i, *_: listing(tokens[i].content, "", place)
    md.renderer.rules["code_inline"] = lambda tokens, i, *_: _inline(tokens[i], place)
    md.renderer.rules["table_open"] = lambda *_: '<div class="table" tabindex="0"><table>\n'
    md.renderer.rules["table_close"] = lambda *_: "</table></div>\n"
    return md.renderer.render(tokens, md.options, {})


def listing(source: str, language: str, place: Place) -> str:
    """A block of code."""
    return f'<pre tabindex="0"><code>{code(source, language, place)}</code></pre>\n'


def _link(token: Token, place: Place) -> None:
    for child in token.children or []:
        for name in ("href", "src"):
            address = child.attrGet(name)
            if address:
                child.attrSet(name, place.link(str(address)))
        _link(child, place)
    inside = 0
    for child in token.children or []:  # A name inside a link must not become a second link.
        inside += (child.type == "link_open") - (child.type == "link_close")
        child.meta["linked"] = inside > 0


def _inline(token: Token, place: Place) -> str:
    piece = f"<code>{html.escape(token.content, quote=False)}</code>"
    name = token.content.removesuffix("()")
    spellings = [] if token.meta.get("linked") else [name, name.removeprefix("minicpgd.")]
    addresses = (names.get(spelling) for spelling in spellings for names in (place.names, place.known))
    address = next(filter(None, addresses), None)
    return f'<a href="{address}">{piece}</a>' if address else piece


def plain(page: str) -> str:
    """HTML to the text that the search reads."""
    without = re.sub(r"<(math|style|script)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", without))).strip()
