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
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Template

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "builder"))

from prose import Place, code, plain, render  # noqa: E402
from source import Part, definitions, docstring_to_markdown, imported, module_name, parts_of  # noqa: E402

from notebooks import cells_of, code_of, notebook_html  # noqa: E402 (they stand beside this file, not in a package)

PAGES = {
    "index": "Start here",
    "house": "The house, and one step",
    "teaching": "A lesson in forty minutes",
    "results": "How hard can it be pushed?",
    "qlora": "A real model on your card",
    "metrics": "Every metric",
    "glossary": "Glossary",
    "exam": "Twenty questions",
}
REPOSITORY = "https://github.com/minicpgd/minicpgd"
PACKAGE = ROOT / "minicpgd"
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


class Site:
    """What is where: modules and their parts, names and where they are defined."""

    def __init__(self) -> None:
        paths = {module_name(path, PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
        self.paths = {name: paths[name] for name in sorted(paths, key=_floor())}
        self.sources = {name: path.read_text() for name, path in self.paths.items()}
        self.parts = {name: parts_of(text) for name, text in self.sources.items()}
        self.notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
        self.metrics = re.findall(r"^## `(\w+)`", (HERE / "metrics.md").read_text(), flags=re.MULTILINE)
        self.defined = {name: set(definitions(parts)) for name, parts in self.parts.items()}
        self.known = self._known()

    def _known(self) -> dict[str, str]:
        """Every name that means one thing only, and its address; the names of files, too."""
        places: dict[str, list[str]] = {}
        for module, names in self.defined.items():
            for name in names:
                places.setdefault(name, []).append(f"{_source_page(module)}#{name}")
        known = {name: found[0] for name, found in places.items() if len(found) == 1 and not name.startswith("_")}
        for module, path in self.paths.items():
            files = [str(path.relative_to(ROOT)), str(path.relative_to(PACKAGE)), f"minicpgd.{module}"]
            files += [f"{path.parent.relative_to(ROOT)}/"] if path.name == "__init__.py" else []
            known |= dict.fromkeys(files, _source_page(module))
        return known | {path.name: f"notebooks/{path.stem}.html" for path in self.notebooks}

    def spoken(self) -> dict[str, str]:
        """For prose, where a bare word is a setting or a metric: `known`, and those."""
        settings = [name for name in self.defined["config"] if name.startswith("TrainConfig.")]
        known = self.known | {name.partition(".")[2]: f"{_source_page('config')}#{name}" for name in settings}
        return known | {name: f"metrics/{name}.html" for name in self.metrics}

    def resolve(self, module: str, name: str) -> str | None:
        """The address of a name of a module, be it defined there or imported."""
        if name in self.defined.get(module, ()):
            return f"{_source_page(module)}#{name}"
        below = f"{module}.{name}".strip(".")
        if below in self.parts:
            return _source_page(below)
        for here, origin, there in imported(self.sources.get(module, "")):
            if here == name and (origin, there) != (module, name):
                return self.resolve(origin, there)
        return None

    def scope(self, source: str, module: str | None = None) -> dict[str, str]:
        """The names that mean something in a piece of Python, each with its address."""
        names = {}
        for here, origin, there in imported(source):
            found = self.resolve(origin, there) if there else _source_page("")
            if found:
                names[here] = found
            below = f"{origin}.{there}".strip(".")
            if below in self.parts:  # a module: its names, with a dot
                inside = self.defined[below] | {alias for alias, *_ in imported(self.sources[below])}
                names |= {f"{here}.{name}": at for name in inside if (at := self.resolve(below, name))}
        if module is not None:
            names |= {name: f"{_source_page(module)}#{name}" for name in self.defined[module]}
        return names


def _floor() -> Callable[[str], tuple[int, str]]:
    """Modules from the ground up, as the import contract in pyproject.toml has them; the package's own first."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [layer.removeprefix("minicpgd.") for layer in reversed(contract["layers"])]
    order = {name: number for number, name in enumerate(layers)}
    return lambda name: (order.get(name.split(".")[0], -1 if not name else len(order)), name)


def _source_page(module: str) -> str:
    return f"source/{module or 'minicpgd'}.html"


def linker(origin: Path, root: str, missing: list[str]) -> Callable[[str], str]:
    """A function from an address as written in `origin` to one on the site; what leads nowhere goes to `missing`."""

    def link(address: str) -> str:
        if re.match(r"[a-z]+:|#", address):
            return address
        path, _, fragment = address.partition("#")
        target = (origin.parent / path).resolve()
        inside = PurePosixPath(target.relative_to(ROOT))
        hash_ = f"#{fragment}" if fragment else ""
        if not target.exists():
            missing.append(f"{origin.relative_to(ROOT)}: {address}")
        if inside.parts[:2] == ("docs", "figures"):
            return f"{root}{inside.relative_to('docs')}"
        if inside.parent == PurePosixPath("docs") and inside.suffix == ".md":
            return f"{root}{inside.stem}.html{hash_}"
        if inside.parts[0] == "notebooks" and inside.stem[:2].isdigit():
            return f"{root}notebooks/{inside.stem}.html{hash_}"
        if inside.parts[0] == "minicpgd" and inside.suffix == ".py":
            return f"{root}{_source_page(module_name(target, PACKAGE))}{hash_}"
        if str(inside) == "README.md":
            return f"{root}index.html{hash_}"
        return f"{REPOSITORY}/tree/main/{inside}{hash_}"

    return link


def prefixed(names: Mapping[str, str], root: str) -> dict[str, str]:
    """The same addresses, seen from a page."""
    return {name: root + address for name, address in names.items()}


def pages_of(site: Site, missing: list[str]) -> Iterator[Page]:
    """Every page, with its body."""
    for name, title in PAGES.items():
        page, path = Page(f"{name}.html", title, "prose", f"docs/{name}.md"), HERE / f"{name}.md"
        place = Place(known=site.spoken(), link=linker(path, "", missing))
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
        place = Place(names, prefixed(site.spoken(), page.root), linker(path, page.root, missing))
        page.body = notebook_html(path, place)
        yield page
    for module, path in site.paths.items():
        page = Page(_source_page(module), str(path.relative_to(ROOT)), "source", str(path.relative_to(ROOT)))
        page.body = source_html(site, module, page, missing)
        yield page


def _title(notebook: Path) -> str:
    return cells_of(notebook)[0]["source"].splitlines()[0].lstrip("# ")


def _split_metrics(text: str) -> tuple[str, dict[str, str]]:
    head, *pieces = re.split(r"^## (?=`\w+`)", text, flags=re.MULTILINE)
    return head, {re.match(r"`(\w+)`", piece)[1]: f"# {piece}" for piece in pieces}  # type: ignore[index]


def _metric_page(site: Site, metric: str, text: str, missing: list[str]) -> Page:
    page = Page(f"metrics/{metric}.html", metric, "prose", "docs/metrics.md")
    known = {name: address for name, address in site.spoken().items() if name != metric}
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
        if not part.name and all(re.match(r"from|import|[ )]|$", line) for line in part.code.splitlines()):
            imports = code(part.code.strip("\n"), "python", place)
            rows.append(f"<details><summary>imports</summary><pre><code>{imports}</code></pre></details>\n")
            continue
        own = {f"{owner}.{name.partition('.')[2]}": names[name] for owner in ("self", "cls") for name in names
               if part.inside and name.startswith(f"{part.inside}.")}  # fmt: skip
        rows.append(_part_html(part, Place(names | own, place.known, place.link)))
    return "".join(rows)


def _part_html(part: Part, place: Place) -> str:
    name = f"{part.inside}.{part.name}" if part.inside else part.name
    defines = part.name and re.search(rf"(def|class) {part.name}\b", part.code)
    heading = f'<h3 id="{name}"><code>{name}</code></h3>' if defines else ""
    anchor_ = f' id="{name}"' if name and not defines else ""
    field = " field" if part.inside and not defines else ""
    said = render(docstring_to_markdown(part.prose), place, level=2) if part.prose else ""
    shown = code(textwrap.dedent(part.code).strip("\n"), "python", place)
    return (
        f'<section class="part{field}"{anchor_}><div class="said">{heading}{said}</div>'
        f'<pre tabindex="0"><code>{shown}</code></pre></section>\n'
    )


def navigation(site: Site, page: Page) -> str:
    """The list of all pages, as seen from one."""

    def entry(address: str, title: str) -> str:
        here = ' class="here" aria-current="page"' if address == page.address else ""
        return f'<li><a href="{page.root}{address}"{here}>{title}</a></li>'

    groups = {
        "Pages": [entry(f"{name}.html", title) for name, title in PAGES.items()],
        "Notebooks": [entry(f"notebooks/{path.stem}.html", _title(path)) for path in site.notebooks],
        "Source, ground floor first": [
            entry(_source_page(name), str(path.relative_to(PACKAGE))) for name, path in site.paths.items()
        ],
    }
    return "".join(f"<h2>{title}</h2><ul>{''.join(entries)}</ul>" for title, entries in groups.items())


def search_entries(page: Page) -> Iterator[list[str]]:
    """[page, heading, address, text] for each stretch of a page that has a heading."""
    cuts = [(0, "", page.title), *((m.start(), m[2], plain(m[3])) for m in HEADING.finditer(page.body))]
    for (start, name, heading), (end, *_) in zip(cuts, [*cuts[1:], (len(page.body), "", "")], strict=True):
        text = plain(page.body[start:end]).lower()
        if text:
            yield [page.title, heading, page.address + (f"#{name}" if name else ""), text[:4000]]


def build(folder: Path) -> int:
    """Write the site, and return how many pages it has.

    Raises:
        SystemExit: a page links to a file that is not there.
    """
    missing: list[str] = []
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
