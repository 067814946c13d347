"""Builds the site: pages, annotated source and notebooks go in, a folder of HTML comes out that needs no network.

    python docs/build.py          into docs/_site; open docs/_site/index.html

Each page of prose is a Markdown file here; PAGES says which, and in what order they are listed. Every module of the
package becomes a page of prose beside code, every notebook one with its outputs, every metric one of its own.
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

# ruff: noqa: E402 (what is imported stands beside this file, in no package)
from executed import cells_of, code_of, notebook_html
from names import PACKAGE, REPOSITORY, ROOT, Site, linker, prefixed, source_page
from prose import Place, code, plain, render
from source import Part, docstring_to_markdown

PAGES = {
    "index": "Start here",
    "house": "The house, and one step",
    "teaching": "A lesson in forty minutes",
    "results": "How hard can it be pushed?",
    "qlora": "A real model on your card",
    "scale": "From this laptop to a cluster",
    "peers": "Beside the peers",
    "reliability": "What can go wrong",
    "metrics": "Every metric",
    "glossary": "Glossary",
    "exam": "Twenty questions",
}
TEMPLATE = Template((HERE / "builder" / "page.html").read_text())
HEADING = re.compile(r'<h([123])[^>]*? id="([^"]+)"[^>]*>(.*?)</h\1>', re.DOTALL)


@dataclass
class Page:
    """`address` from the site's root, `kind` as in style.css, `origin` the file that it is made from."""

    address: str
    title: str
    kind: str
    origin: str
    body: str = ""

    @property
    def root(self) -> str:
        """The way from here to the site's root."""
        return "../" * self.address.count("/")


def pages_of(site: Site, missing: list[str]) -> Iterator[Page]:
    """Every page, with its body."""
    for name, title in PAGES.items():
        page, path = Page(f"{name}.html", title, "prose", f"docs/{name}.md"), HERE / f"{name}.md"
        place = Place(known=site.spoken, link=linker(path, "", missing))
        text = path.read_text()
        if name == "metrics":
            text, sections = _split_metrics(text)
            for metric, section in sections.items():
                yield _metric_page(site, metric, section, missing)
        page.body = _drawn(render(text, place))
        yield page
    for path in site.notebooks:
        page = Page(f"notebooks/{path.stem}.html", _title(path), "notebook", str(path.relative_to(ROOT)))
        names = prefixed(site.scope(code_of(path)), page.root)
        place = Place(names, prefixed(site.spoken, page.root), linker(path, page.root, missing))
        page.body = notebook_html(path, place)
        yield page
    for module, path in site.paths.items():
        page = Page(source_page(module), str(path.relative_to(ROOT)), "source", str(path.relative_to(ROOT)))
        page.body = source_html(site, module, page, missing)
        yield page


def _title(notebook: Path) -> str:
    return cells_of(notebook)[0]["source"].splitlines()[0].lstrip("# ")


def _split_metrics(text: str) -> tuple[str, dict[str, str]]:
    head, *pieces = re.split(r"^## (?=`\w+`)", text, flags=re.MULTILINE)
    return head, {re.match(r"`(\w+)`", piece)[1]: f"# {piece}" for piece in pieces}  # type: ignore[index]


def _metric_page(site: Site, metric: str, text: str, missing: list[str]) -> Page:
    page = Page(f"metrics/{metric}.html", metric, "prose", "docs/metrics.md")
    known = {name: address for name, address in site.spoken.items() if name != metric}
    place = Place(known=prefixed(known, page.root), link=linker(HERE / "metrics.md", page.root, missing))
    others = " · ".join(f'<a href="{name}.html"><code>{name}</code></a>' for name in site.metrics if name != metric)
    page.body = f'{render(text, place)}<hr><p class="kind">Other metrics: {others}</p>'
    return page


def _drawn(body: str) -> str:
    """Drawings stand in the page itself, so that they take its colours and their links work."""

    def drawing(found: re.Match[str]) -> str:
        return re.sub(r"<svg", '<svg class="drawn"', (HERE / found[1]).read_text(), count=1)

    return re.sub(r'<p><img src="([^"]+\.svg)"[^>]*></p>', drawing, body)


def source_html(site: Site, module: str, page: Page, missing: list[str]) -> str:
    """A module as prose beside code."""
    path, parts = site.paths[module], site.parts[module]
    names = prefixed(site.scope(site.sources[module], module), page.root)
    place = Place(names, prefixed(site.known, page.root), linker(path, page.root, missing))
    title, _, rest = (parts[0].prose or page.title).partition("\n\n")
    heading = render(f"# {' '.join(title.split()).removesuffix('.')}", place)
    head = render(docstring_to_markdown(rest), place, level=1)
    rows = [f'<div class="module"><p class="kind">{page.title}</p>{heading}{head}</div>\n']
    for part in parts[1:]:
        if part.imports:
            imports = code(part.code.strip("\n"), "python", place)
            rows.append(f"<details><summary>imports</summary><pre><code>{imports}</code></pre></details>\n")
            continue
        own = {f"{owner}.{name.partition('.')[2]}": names[name] for owner in ("self", "cls") for name in names
               if part.inside and name.startswith(f"{part.inside}.")}  # fmt: skip
        rows.append(_part_html(part, Place(names | own, place.known, place.link)))
    return "".join(rows)


def _part_html(part: Part, place: Place) -> str:
    name = part.full_name
    anchors = "".join(f'<a id="{other}"></a>' for other in [name, *part.also] if other)
    if part.defines:
        anchors = f'<h3 id="{name}"><code>{name}</code></h3>' + anchors.removeprefix(f'<a id="{name}"></a>')
    kind = " field" if part.inside and not part.defines else ""
    kind += " long" if not part.code.strip() or max(map(len, part.code.splitlines())) > 125 else ""
    said = render(docstring_to_markdown(part.prose), place, level=2) if part.prose else ""
    shown = code(textwrap.dedent(part.code).strip("\n"), "python", place)
    listed = f'<pre tabindex="0"><code>{shown}</code></pre>' if shown else ""
    return f'<section class="part{kind}"><div class="said">{anchors}{said}</div>{listed}</section>\n'


def navigation(site: Site, page: Page) -> str:
    """The list of all pages, as seen from one."""

    def entry(address: str, title: str) -> str:
        here = ' class="here" aria-current="page"' if address == page.address else ""
        return f'<li><a href="{page.root}{address}"{here}>{title}</a></li>'

    groups = {
        "Pages": [entry(f"{name}.html", title) for name, title in PAGES.items()],
        "Notebooks": [entry(f"notebooks/{path.stem}.html", _title(path)) for path in site.notebooks],
        "Source, ground floor first": [
            entry(source_page(name), str(path.relative_to(PACKAGE))) for name, path in site.paths.items()
        ],
    }
    return "".join(f"<h2>{title}</h2><ul>{''.join(entries)}</ul>" for title, entries in groups.items())


def search_entries(page: Page) -> Iterator[list[str]]:
    """[page, heading, address, text] for each stretch of a page that has a heading."""
    cuts = [(0, "", page.title), *((m.start(), m[2], plain(m[3])) for m in HEADING.finditer(page.body))]
    for (start, name, heading), (end, *_) in zip(cuts, [*cuts[1:], (len(page.body), "", "")], strict=True):
        text = plain(page.body[start:end]).lower()
        if text:
            yield [page.title, heading, page.address + (f"#{name}" if name else ""), text]


def build(folder: Path) -> int:
    """Write the site, and return how many pages it has.

    Raises:
        SystemExit: a page links to a file that is not there, or is not listed.
    """
    missing: list[str] = []
    unlisted = sorted({path.stem for path in HERE.glob("*.md")} - set(PAGES))
    if unlisted:
        raise SystemExit(f"docs/{unlisted[0]}.md: not in PAGES of docs/build.py; add it, with a title for the menu")
    site = Site()
    pages = list(pages_of(site, missing))
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
        footer = f'Made from <a href="{REPOSITORY}/blob/main/{page.origin}">{page.origin}</a>. Apache-2.0.'
        fields = {"title": page.title, "root": page.root, "kind": page.kind, "body": page.body, "footer": footer}
        path.write_text(TEMPLATE.substitute(fields, nav=navigation(site, page)))
    return len(pages)


if __name__ == "__main__":
    target = HERE / "_site"
    print(f"{build(target)} pages: open {target / 'index.html'}")
