"""The site has every page and a menu of all of them; links work, no LaTeX is left, and no line of source is lost."""

import ast
import inspect
import io
import json
import re
import shutil
import sys
import tokenize
from dataclasses import fields, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import load_script

from minicpgd import ALGORITHMS, TrainConfig

ROOT = Path(__file__).parent.parent
build = load_script(ROOT / "docs" / "build.py")
names, annotated, reference = (sys.modules[name] for name in ("names", "source", "reference"))
PACKAGES = "algorithms tasks models recipes memory training experiments plots cli integrations".split()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "_site"
    build.build(folder)
    return folder


class Reader(HTMLParser):
    """The ids and addresses of a page, and its text that is neither code nor formula."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.loads, self.text, self.inside = set(), [], [], [], []
        self.in_link = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("id"):
            assert attributes["id"] not in self.ids, f"id {attributes['id']} twice"
            self.ids.add(attributes["id"])
        if tag == "a" and "href" in attributes:
            assert not self.in_link, f"{attributes['href']} is inside another link"
            self.links.append(attributes["href"])
            self.in_link = True
        if tag in ("img", "script") and "src" in attributes or tag == "link":
            self.loads.append(attributes.get("src") or attributes["href"])
        if tag in ("code", "pre", "script", "style", "math"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag == "a":
            self.in_link = False
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


@cache
def read(path):
    return Reader(path.read_text())


def pages(site):
    return sorted(site.rglob("*.html"))


def test_every_module_notebook_and_metric_has_a_page(site):
    modules = {
        annotated.module_name(path, ROOT / "minicpgd") or "minicpgd" for path in (ROOT / "minicpgd").rglob("*.py")
    }
    assert {path.stem for path in (site / "source").iterdir()} == modules
    assert {path.stem for path in (site / "notebooks").iterdir()} == {p.stem for p in ROOT.glob("notebooks/*.ipynb")}
    metrics = re.findall(r"^## `(\w+)`", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
    assert {path.stem for path in (site / "metrics").iterdir()} == set(metrics) >= {"reward", "kl_old", "entropy"}
    written = {f"{name}.html" for group in build.PAGES.values() for name in group}
    assert written == {path.name for path in site.iterdir() if path.suffix == ".html"}
    assert {"algorithms.html", "commands.html", "contributing.html"} <= written


def menu_of(page):
    """The titles and addresses in the menu of a page, by group."""
    menu = re.search(r'<nav id="pages".*?</nav>', page.read_text(), re.DOTALL)[0]
    pieces = re.split(r"<h2>(.*?)</h2>", menu)[1:]
    entries = [re.findall(r'<a href="([^"]+)"[^>]*>(.*?)</a>', piece) for piece in pieces[1::2]]
    return dict(zip(pieces[::2], entries, strict=True))


def test_the_menu_lists_every_page_once_in_six_groups(site):
    """Metrics are listed on their own page, and each page finds all others with its own way to the root."""
    groups = menu_of(site / "index.html")
    assert list(groups) == ["Start here", "Learn", "Use", "Results", "Source", "Contribute"]
    addresses = [address for entries in groups.values() for address, _ in entries]
    assert len(addresses) == len(set(addresses))
    assert set(addresses) == {str(p.relative_to(site)) for p in pages(site) if p.parent.name != "metrics"}
    one_page = [f"notebooks/{path.stem}.html" for path in ROOT.glob("notebooks/00_*.ipynb")]
    assert [address for address, _ in groups["Start here"]] == ["index.html", *one_page, "algorithms.html"]
    assert [title[:2] for _, title in groups["Learn"][:7]] == [f"{number}." for number in range(1, 8)]
    below = menu_of(site / "source" / "algorithms.loss.html")
    assert [title for _, title in below["Source"]] == [title for _, title in groups["Source"]]


def test_the_source_is_listed_by_package_lowest_layer_first(site):
    """An import points upwards in the menu, between packages and inside each."""
    titles = [title for _, title in menu_of(site / "index.html")["Source"]]
    assert [title[:-1] for title in titles if title[:-1] in PACKAGES] == PACKAGES
    first = [titles.index(title) for title in ("errors.py", "files.py", "algorithms/", "config.py", "tasks/")]
    assert first == sorted(first)
    listed = [address for address, _ in menu_of(site / "index.html")["Source"]]
    position = {address.removeprefix("source/").removesuffix(".html"): i for i, address in enumerate(listed)}
    for path in (ROOT / "minicpgd").rglob("*.py"):
        module = annotated.module_name(path, ROOT / "minicpgd")
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        for origin in [(node.module or "").removeprefix("minicpgd.") for node in top]:
            if path.name != "__init__.py" and "." in origin and origin in position:
                assert position[origin] < position[module], f"{module} is listed before {origin}"


def test_the_menu_opens_the_folder_of_the_page(site):
    page = (site / "source" / "algorithms.loss.html").read_text()
    assert page.count("<details open>") == 1
    assert '<details open><summary><a href="../source/algorithms.html">algorithms/</a>' in page
    assert "<details open>" not in (site / "index.html").read_text()


def test_the_page_of_a_package_links_to_its_modules(site):
    for package in PACKAGES:
        page = (site / "source" / f"{package}.html").read_text()
        modules = re.findall(r'<nav class="modules".*?</nav>', page, re.DOTALL)
        files = {p.name for p in (ROOT / "minicpgd" / package).glob("*.py")} - {"__init__.py"}
        folders = {f"{p.parent.name}/" for p in (ROOT / "minicpgd" / package).glob("*/__init__.py")}
        assert set(re.findall(r"<li><a [^>]*><code>([\w./]+)</code>", "".join(modules))) == files | folders, package


def test_reading_order_follows_imports_and_then_the_alphabet():
    imports = {"models.policy": [("x", "models.zebra", "x")], "models.zebra": [], "models.ant": [], "models": []}
    imports |= {"errors": [], "": [], "cli.main": [("policy", "models", "policy")], "unknown": []}
    order = ["", "errors", "models", "models.ant", "models.zebra", "models.policy", "cli.main", "unknown"]
    assert names.reading_order(imports) == order


@pytest.mark.parametrize("name", ["algorithms", "commands"])
def test_the_generated_pages_are_current(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert reference.MARKED.search(page)[2] == name
    assert reference.filled(page) == page, "run `make docs`"


def test_the_table_has_every_row_with_its_answers():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "algorithms.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(ALGORITHMS)
    cells = {name: cells.split(" | ") for name, cells in rows}
    paper = "[2505.12504](https://arxiv.org/abs/2505.12504)"
    cpgd = [f"CPGD, {paper}", "group, / std", "d·A, clipped", "per response", "yes", ALGORITHMS["cpgd"].shows]
    assert cells["cpgd"] == cpgd
    assert cells["gspo"][2] == "s·A, clipped"
    assert cells["dapo"][2] == "r·A, clipped above at 1.28"
    assert cells["dr_grpo"][1:5] == ["group", "r·A, clipped", "/ longest allowed", ""]
    assert {name for name, row in cells.items() if row[4] == "yes"} == {n for n, row in ALGORITHMS.items() if row.drift}


def test_a_new_row_shows_the_names_of_functions_without_a_word():
    def my_surrogate():
        pass

    row = replace(ALGORITHMS["grpo"], name="mine", label="Mine", surrogate=my_surrogate)
    assert reference._algorithm_row(row)[1:4] == ["Mine, ours", "group, / std", "`my_surrogate`"]


def test_the_commands_have_every_flag_and_default_of_the_settings():
    page = (ROOT / "docs" / "commands.md").read_text()
    train = page.partition("## `minicpgd train`")[2].partition("\n## ")[0]
    for field in fields(TrainConfig):
        line = re.search(rf"^- `--{field.name.replace('_', '-')}`.*$", train, re.MULTILINE)
        assert line, field.name
        default = {True: "on", False: "off"}.get(field.default) if isinstance(field.default, bool) else field.default
        assert line[0].rstrip("\\").endswith((f"(default: `{default}`)", f"(default: {default})")), line[0]
    assert not re.search("[╭│╰─]", page)


def test_the_commands_have_the_purpose_of_every_command():
    page = (ROOT / "docs" / "commands.md").read_text()
    assert re.findall(r"^## `minicpgd (\w+)`", page, re.MULTILINE) == list(reference.COMMANDS)
    for name, command in reference.COMMANDS.items():
        purpose = " ".join(inspect.getdoc(command).partition("\n\n")[0].split())
        assert f"## `minicpgd {name}`\n\n{purpose}\n" in page, name


def test_a_help_is_read_whole():
    text = """usage: minicpgd x [-h] [OPTIONS]

Do a thing. It takes a while.

 positional arguments
 --------------------
  [STR]         a folder. (default: embedded)

 options
 -------
  -h, --help    show this help message and exit
  --jobs {None}|INT
                runs at a time,
                one per core. (default: None)
  --base {full,half,none}
                of what. (default: full)

 settings options
 ----------------
  A group of settings.
  --------------------
  --out {None}|PATH|{auto}
                where it goes. (required)
"""
    command = reference.parse_help("evaluate", text)
    assert command.purpose == "Do a thing. It takes a while."
    assert [(o.name, o.kind, o.default, o.meaning, o.group) for o in command.options] == [
        ("RUN_OR_MODEL", "STR", "embedded", "a folder.", ""),
        ("--jobs", "INT", "None", "runs at a time, one per core.", ""),
        ("--base", "`full`, `half` or `none`", "full", "of what.", ""),
        ("--out", "PATH or `auto`", "", "where it goes.", "Settings\n\nA group of settings."),
    ]


def test_every_link_leads_somewhere(site):
    count = 0
    for page in pages(site):
        for address in read(page).links:
            if re.match(r"https?:", address):
                continue
            path, _, fragment = address.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {address}"
            assert not fragment or fragment in read(target).ids, f"{page.name}: {address}"
            count += 1
    assert count > 5000


def test_nothing_is_loaded_from_a_network(site):
    for page in pages(site):
        for address in read(page).loads:
            assert address.startswith("data:") or (page.parent / address).exists(), f"{page.name}: {address}"
    for asset in ("style.css", "page.js"):
        assert "http" not in (site / "assets" / asset).read_text()


def test_no_latex_is_left(site):
    formulas = 0
    for page in pages(site):
        text = "".join(read(page).text)
        assert "$" not in text, f"{page.name}: {text[max(0, text.find('$') - 60) :][:120]}"
        assert not re.search(r"\\[a-zA-Z]", text), page.name
        mathml = re.findall(r"<math.*?</math>", page.read_text(), flags=re.DOTALL)
        assert not [formula for formula in mathml if re.search(r"\\[a-zA-Z]|<mi>&</mi>", formula)], page.name
        formulas += len(mathml)
        outside = re.sub(r'<div class="formula".*?</div>', "", page.read_text(), flags=re.DOTALL)
        assert 'display="block"' not in outside, page.name
    assert formulas > 200


@pytest.mark.parametrize("path", sorted((ROOT / "minicpgd").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_of_the_source_is_lost(path):
    """Its code, token by token; its comments and docstrings, word by word."""
    source = path.read_text()
    parts = annotated.parts_of(source)
    code = "\n".join(part.code for part in parts)
    prose = " ".join(" ".join(part.prose for part in parts).split())

    def words(text):
        silent = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        return [t.string for t in tokens if t.type not in silent]

    remaining = iter(words(source))
    for word in words(code):  # The words keep their order, and each word between them has to be prose.
        for candidate in remaining:
            if candidate == word:
                break
            text = candidate.strip("rf").strip("\"'")
            assert candidate.startswith(("'", '"', 'r"', "r'")), f"lost: {candidate}"
            assert " ".join(text.split())[:40] in prose, f"lost: {text[:60]}"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt:"):
            assert token.string in code or token.string.lstrip("# ") in prose, f"lost: {token.string}"


def test_names_lead_to_their_definitions(site):
    step = (site / "source" / "training.step.html").read_text()
    for address in (
        "../source/algorithms.loss.html#max_advantage_coef",
        "../source/models.sampling.html#generate",
        "../source/training.step.html#Learner.update",
    ):
        assert f'href="{address}"' in step, address
    notebook = (site / "notebooks" / "01_cpgd_step_by_step.html").read_text()
    assert 'href="../source/training.step.html#Learner"' in notebook
    assert 'href="../source/plots.tokens.html#token_text"' in notebook  # This is the definition, not the package.
    assert 'href="metrics/kl_old.html"' in (site / "metrics.html").read_text()
    known, config = names.Site().prose_names, read(site / "source" / "config.html").ids
    for name in ("num_iterations", "seed", "temperature"):
        assert known[f"--{name.replace('_', '-')}"] == known[name]
        assert known[name].partition("#")[2] in config, name
    assert f'href="{known["--drift-coef"]}"' in (site / "commands.html").read_text()


def test_each_part_of_a_source_page_is_prose_and_then_code(site):
    for page in (site / "source").iterdir():
        openings = re.findall(r'<section class="part[^"]*">(<div class="text">)?', page.read_text())
        assert all(openings), page.name


def test_a_field_without_a_docstring_does_not_join_one_that_has_a_docstring():
    lines = ["class A:", '    """A."""', "    a: int", "    b: int", '    """B."""', "    c: int", "    d: int"]
    lines += ["    e: int", '    """E."""', ""]
    parts = annotated.parts_of("\n".join(lines))[1:]
    assert [(part.prose, part.name, part.also) for part in parts] == [
        ("A.", "A", ["A.a"]),
        ("B.", "b", []),
        ("", "c", ["A.d"]),
        ("E.", "e", []),
    ]


def test_arguments_become_a_list(site):
    loss = (site / "source" / "algorithms.loss.html").read_text()
    assert "<li><code>mask</code>: (B, T), true or 1 where a token belongs to the response" in loss
    assert "<strong>Raises</strong>" in loss
    assert loss.count("<summary>imports</summary>") == 1
    assert "Args:" not in "".join(read(site / "source" / "algorithms.loss.html").text)


def test_a_comment_before_a_blank_line_is_a_remark_of_its_own():
    parts = annotated.parts_of('"""M."""\n\n# All of\n# these.\n\n\ndef f():\n    """F."""\n    return 1\n')
    assert [(part.prose, part.name) for part in parts] == [("M.", ""), ("All of\nthese.", ""), ("F.", "f")]


def test_solutions_are_folded_and_questions_stand_out(site):
    for page in (site / "notebooks").glob("0[1-7]*"):
        body = page.read_text()
        assert body.count("<summary>Solution ") == 3, page.name
        assert body.count('class="predict"') >= 4, page.name
        assert body.count('<img class="figure"') >= 2, page.name


def test_search_finds_a_definition(site):
    text = (site / "assets" / "search.js").read_text()
    entries = json.loads(text.removeprefix("window.SEARCH = ").rstrip(";\n"))
    for page, _, address, _ in entries:
        path, _, fragment = address.partition("#")
        assert not fragment or fragment in read(site / path).ids, f"{page}: {address}"
    hits = {address for _, heading, address, body in entries if "bounded_drift" in heading + body}
    assert {"source/algorithms.divergence.html#bounded_drift"} <= hits


def test_links_lead_to_pages_of_the_site_and_a_broken_one_is_reported():
    missing = []
    link = build.linker(ROOT / "docs" / "index.md", "", missing)
    assert link("results.md#1-the-map") == "results.html#1-the-map"
    assert link("../minicpgd/plots/runs.py") == "source/plots.runs.html"
    assert link("../minicpgd/plots/") == link("../minicpgd/plots/__init__.py") == "source/plots.html"
    assert link("../README.md") == "index.html"
    assert link("../CONTRIBUTING.md#5-sentences-are-plain-english") == "contributing.html#5-sentences-are-plain-english"
    assert link("../results/fair").startswith("https://")
    assert not missing
    link("../minicpgd/nowhere.py")
    assert missing == ["docs/index.md: ../minicpgd/nowhere.py"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="opens pages in Chromium, which is not installed")
def test_in_a_browser_without_a_network(site):
    """No page has an error or is wider than a phone. Code of 120 columns fits a laptop. Search, menu and theme work."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives Chromium; `pip install playwright`")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
        tab, wrong = context.new_page(), []
        tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        for page in pages(site):
            tab.goto(page.as_uri())
            wide = tab.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"{page.name}: {wide} pixels wide"
            fits = "b => b.scrollWidth <= b.clientWidth || getComputedStyle(b).overflowX == 'auto'"
            assert tab.eval_on_selector_all(".formula, .wide, .table, pre", f"all => all.every({fits})"), page.name
            assert not wrong, f"{page.name}: {wrong}"
        for width in (1300, 1540, 1920):
            tab.set_viewport_size({"width": width, "height": 900})
            for page in sorted((site / "source").iterdir()):
                tab.goto(page.as_uri())
                narrow = f".filter(b => b.textContent.split('\\n').every(line => line.length <= {build.WIDEST_LINE}))"
                scrolling = f"all => all{narrow}.filter(b => b.scrollWidth > b.clientWidth).map(b => b.textContent)"
                assert tab.eval_on_selector_all(".part pre", scrolling) == [], f"{page.name} at {width}"
        tab.set_viewport_size({"width": 390, "height": 844})
        tab.goto((site / "source" / "models.sampling.html").as_uri())
        tab.click("#menu")
        assert tab.is_visible("#pages")
        assert 0 < tab.locator("#pages a.here").bounding_box()["y"] < 844
        tab.click("#menu")
        assert not tab.is_visible("#pages")
        before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.click("#theme")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
        tab.fill("#search", "bounded_drift")
        tab.wait_for_selector("#results a")
        tab.press("#search", "Enter")
        tab.wait_for_url("**/source/algorithms.divergence.html#bounded_drift")
        assert not wrong
        browser.close()
