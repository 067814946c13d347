"""Builds the site: pages, annotated source and notebooks go in, and a folder of HTML that needs no network comes out.

    python docs/build.py          into docs/_site; open docs/_site/index.html

Each page of prose is a Markdown file in this folder; PAGES lists them in the order of the menu. Every module of the
package becomes a page of prose beside code, every notebook a page with its outputs, and every metric a page of its own.
Before that, the generated parts of three pages are written again (builder/reference.py).
"""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "builder"))

# ruff: noqa: E402 (the modules below are in the folder builder, which is no package)
from names import REPOSITORY, ROOT, Site, linker, prefixed, source_page
from notebook_pages import code_of, notebook_html, title_of
from prose import Place, code, plain, render
from reference import write_reference
from source import Part, docstring_to_markdown

PAGES = {
    "Start here": {"index": "Overview", "algorithms": "The algorithms"},
    "Learn": {"teaching": "A lesson in forty minutes", "glossary": "Glossary", "exam": "Twenty questions"},
    "Use": {
        "installation": "Installation",
        "commands": "Commands",
        "rewards": "Rewards and answers",
        "qlora": "A real model on your card",
        "scale": "From this laptop to a cluster",
    },
    "Results": {
        "results": "The studies",
        "default": "How the default is chosen",
        "metrics": "Every metric",
        "peers": "Compared with TRL and verl",
        "reliability": "What can go wrong",
    },
    "Source": {"code": "How to read the source"},
    "Contribute": {"contributing": "Contributing"},
}
"""The groups of the menu, and the title of each page of prose. `menu` adds the notebooks and the source."""
TEMPLATE = Template((HERE / "builder" / "page.html").read_text())
HEADING = re.compile(r'<h([123])[^>]*? id="([^"]+)"[^>]*>(.*?)</h\1>', re.DOTALL)
SHORT_LINE, WIDEST_LINE = 70, 120
"""Columns of code. A field of at most 70 is beside its prose on most screens. Code of at most 120 does not scroll on a
laptop, and longer lines get a smaller font."""


@dataclass
class Page:
    """One page of the site."""

    address: str
    """Seen from the site's root."""
    title: str
    kind: str
    """prose, notebook or source, as in style.css."""
    origin: str
    """The file that the page comes from."""
    body: str = ""

    @property
    def root(self) -> str:
        """The way from here to the site's root."""
        return "../" * self.address.count("/")


def file_of(name: str) -> Path:
    """The Markdown file of a page of PAGES."""
    return ROOT / "CONTRIBUTING.md" if name == "contributing" else HERE / f"{name}.md"


def all_pages(site: Site, missing: list[str]) -> Iterator[Page]:
    """Every page, with its body; addresses of links that lead nowhere go to `missing`."""
    for name, title in ((name, title) for group in PAGES.values() for name, title in group.items()):
        path = file_of(name)
        page = Page(f"{name}.html", title, "prose", str(path.relative_to(ROOT)))
        place = Place(known=site.prose_names, link=linker(path, "", missing))
        text = path.read_text()
        if name == "metrics":
            text, sections = _split_metrics(text)
            for metric, section in sections.items():
                yield _metric_page(site, metric, section, missing)
        page.body = _inline_drawings(render(text, place))
        yield page
    for path in site.notebooks:
        page = Page(f"notebooks/{path.stem}.html", title_of(path), "notebook", str(path.relative_to(ROOT)))
        names = prefixed(site.scope(code_of(path)), page.root)
        place = Place(names, prefixed(site.prose_names, page.root), linker(path, page.root, missing))
        page.body = notebook_html(path, place)
        yield page
    for module, path in site.paths.items():
        page = Page(source_page(module), str(path.relative_to(ROOT)), "source", str(path.relative_to(ROOT)))
        page.body = source_html(site, module, page, missing)
        yield page


def _split_metrics(text: str) -> tuple[str, dict[str, str]]:
    head, *pieces = re.split(r"^## (?=`\w+`)", text, flags=re.MULTILINE)
    return head, {re.match(r"`(\w+)`", piece)[1]: f"# {piece}" for piece in pieces}  # type: ignore[index]


def _metric_page(site: Site, metric: str, text: str, missing: list[str]) -> Page:
    page = Page(f"metrics/{metric}.html", metric, "prose", "docs/metrics.md")
    known = {name: address for name, address in site.prose_names.items() if name != metric}
    place = Place(known=prefixed(known, page.root), link=linker(HERE / "metrics.md", page.root, missing))
    others = " · ".join(f'<a href="{name}.html"><code>{name}</code></a>' for name in site.metrics if name != metric)
    page.body = f'{render(text, place)}<hr><p class="origin">Other metrics: {others}</p>'
    return page


def _inline_drawings(body: str) -> str:
    """Put drawings into the page itself, so that they take its colours and their links work."""

    def drawing(found: re.Match[str]) -> str:
        return re.sub(r"<svg", '<svg class="drawing"', (HERE / found[1]).read_text(), count=1)

    return re.sub(r'<p><img src="([^"]+\.svg)"[^>]*></p>', drawing, body)


def source_html(site: Site, module: str, page: Page, missing: list[str]) -> str:
    """A module as prose beside code; the page of a package begins with links to its modules."""
    path, parts = site.paths[module], site.parts[module]
    names = prefixed(site.scope(site.sources[module], module), page.root)
    known = prefixed(site.known | site.neighbours(module), page.root)
    place = Place(names, known, linker(path, page.root, missing))
    title, body = _title_and_body(parts[0].prose or page.title)
    heading = render(f"# {title}", place)
    head = render(docstring_to_markdown(body), place, level=1) + _modules_html(site, module, page)
    sections = [f'<div class="module"><p class="origin">{page.title}</p>{heading}{head}</div>\n']
    for part in parts[1:]:
        if part.imports:
            imports = code(part.code.strip("\n"), "python", place)
            sections.append(f"<details><summary>imports</summary><pre><code>{imports}</code></pre></details>\n")
            continue
        own = {f"{owner}.{name.partition('.')[2]}": names[name] for owner in ("self", "cls") for name in names
               if part.inside and name.startswith(f"{part.inside}.")}  # fmt: skip
        sections.append(_part_html(part, Place(names | own, place.known, place.link)))
    return "".join(sections)


def _title_and_body(docstring: str) -> tuple[str, str]:
    """The first paragraph of a module's docstring as a heading, and the rest."""
    title, _, body = docstring.partition("\n\n")
    return " ".join(title.split()).removesuffix("."), body


def _modules_html(site: Site, package: str, page: Page) -> str:
    """Links to the modules of a package, each with the title of its page."""
    if not site.is_package(package) or not site.members(package):
        return ""
    lines = ""
    for module in site.members(package):
        title, _ = _title_and_body(site.parts[module][0].prose)
        lines += f"- [`{short_name(site, module)}`]({page.root}{source_page(module)}): {title}\n"
    return f'<nav class="modules" aria-label="Modules">{render(lines, Place())}</nav>'


def short_name(site: Site, module: str) -> str:
    """`loss.py` for minicpgd/algorithms/loss.py, and `algorithms/` for a package."""
    return f"{site.paths[module].parent.name}/" if site.is_package(module) else site.paths[module].name


def _part_html(part: Part, place: Place) -> str:
    name = part.full_name
    anchors = "".join(f'<a id="{other}"></a>' for other in [name, *part.also] if other)
    if part.defines:
        anchors = f'<h3 id="{name}"><code>{name}</code></h3>' + anchors.removeprefix(f'<a id="{name}"></a>')
    source = textwrap.dedent(part.code).strip("\n")
    columns = max(map(len, source.splitlines()), default=0)
    is_short = part.inside and not part.defines and 0 < columns <= SHORT_LINE
    kind = " short" if is_short else " long" if not 0 < columns <= WIDEST_LINE else ""
    text = render(docstring_to_markdown(part.prose), place, level=2) if part.prose else ""
    listing = f'<pre tabindex="0"><code>{code(source, "python", place)}</code></pre>' if source else ""
    return f'<section class="part{kind}"><div class="text">{anchors}{text}</div>{listing}</section>\n'


@dataclass
class Entry:
    """A line of the menu, with the lines that unfold below it."""

    address: str
    title: str
    below: "tuple[Entry, ...]" = ()

    def html(self, page: Page) -> str:
        """The line, as seen from a page; the folder that holds the page is open."""
        here = ' class="here" aria-current="page"' if self.address == page.address else ""
        link = f'<a href="{page.root}{self.address}"{here}>{self.title}</a>'
        if not self.below:
            return f"<li>{link}</li>"
        is_open = " open" if page.address in [self.address, *(entry.address for entry in self.below)] else ""
        entries = "".join(entry.html(page) for entry in self.below)
        return f"<li><details{is_open}><summary>{link}</summary><ul>{entries}</ul></details></li>"


def menu(site: Site) -> dict[str, list[Entry]]:
    """All pages by group, in reading order: the one-page notebook comes first, and source files lie in packages."""
    groups = {group: [Entry(f"{name}.html", title) for name, title in PAGES[group].items()] for group in PAGES}
    notebooks = [Entry(f"notebooks/{path.stem}.html", title_of(path)) for path in site.notebooks]
    one_page = [entry for entry in notebooks if entry.address.startswith("notebooks/00")]
    groups["Start here"][1:1] = one_page
    groups["Learn"][:0] = [entry for entry in notebooks if entry not in one_page]
    groups["Source"].append(Entry(source_page(""), "minicpgd/"))
    for module in site.members(""):
        below = tuple(Entry(source_page(name), short_name(site, name)) for name in site.descendants(module))
        groups["Source"].append(Entry(source_page(module), short_name(site, module), below))
    return groups


def navigation(site: Site, page: Page) -> str:
    """The menu as HTML, as seen from a page."""
    groups = menu(site)
    return "".join(f"<h2>{group}</h2><ul>{''.join(e.html(page) for e in groups[group])}</ul>" for group in groups)


def search_entries(page: Page) -> Iterator[list[str]]:
    """[page, heading, address, text] of each section of a page."""
    cuts = [(0, "", page.title), *((m.start(), m[2], plain(m[3])) for m in HEADING.finditer(page.body))]
    for (start, name, heading), (end, *_) in zip(cuts, [*cuts[1:], (len(page.body), "", "")], strict=True):
        text = plain(page.body[start:end]).lower()
        if text:
            yield [page.title, heading, page.address + (f"#{name}" if name else ""), text]


def build(folder: Path) -> int:
    """Write the site, and return the number of its pages.

    Raises:
        SystemExit: a page links to a file that does not exist, or PAGES does not list it.
    """
    missing: list[str] = []
    unlisted = sorted({path.stem for path in HERE.glob("*.md")} - {name for group in PAGES.values() for name in group})
    if unlisted:
        raise SystemExit(f"docs/{unlisted[0]}.md: not in PAGES of docs/build.py; add it, with a title for the menu")
    site = Site()
    pages = list(all_pages(site, missing))
    if missing:
        raise SystemExit("these links lead nowhere:\n  " + "\n  ".join(sorted(set(missing))))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "figures", folder / "figures")
    (folder / "assets").mkdir()
    for name in ("style.css", "page.js"):
        shutil.copy(HERE / "builder" / name, folder / "assets" / name)
    entries = [entry for page in pages for entry in search_entries(page)]
    (folder / "assets" / "search.js").write_text(f"window.SEARCH = {json.dumps(entries, ensure_ascii=False)};\n")
    for page in pages:
        path = folder / page.address
        path.parent.mkdir(parents=True, exist_ok=True)
        footer = f'This page comes from <a href="{REPOSITORY}/blob/main/{page.origin}">{page.origin}</a>. Apache-2.0.'
        fields = {"title": page.title, "root": page.root, "kind": page.kind, "body": page.body, "footer": footer}
        path.write_text(TEMPLATE.substitute(fields, navigation=navigation(site, page)))
    return len(pages)


if __name__ == "__main__":
    target = HERE / "_site"
    write_reference()
    print(f"{build(target)} pages: open {target / 'index.html'}")
