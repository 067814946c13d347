"""The site: every page is there, every link leads somewhere, no LaTeX is left, nothing of the source is lost."""

import io
import json
import re
import shutil
import sys
import tokenize
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import load_script

ROOT = Path(__file__).parent.parent
build = load_script(ROOT / "docs" / "build.py")
annotated = sys.modules["source"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "_site"
    build.build(folder)
    return folder


class Reader(HTMLParser):
    """What of a page matters here: ids, addresses, and the text that is neither code nor formula."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.loads, self.text, self.inside = set(), [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if given.get("id"):
            assert given["id"] not in self.ids, f"id {given['id']} twice"
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script") and "src" in given or tag == "link":
            self.loads.append(given.get("src") or given["href"])
        if tag in ("code", "pre", "script", "style", "math"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
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
    assert {f"{name}.html" for name in build.PAGES} <= {path.name for path in site.iterdir()}


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
        assert not [formula for formula in mathml if re.search(r"\\[a-zA-Z]", formula)], page.name
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
    said = " ".join(" ".join(part.prose for part in parts).split())

    def words(text):
        silent = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        return [t.string for t in tokens if t.type not in silent]

    remaining = iter(words(source))
    for word in words(code):  # in order, and what is skipped on the way is prose
        for candidate in remaining:
            if candidate == word:
                break
            text = candidate.strip("rf").strip("\"'")
            assert candidate.startswith(("'", '"', 'r"', "r'")), f"lost: {candidate}"
            assert " ".join(text.split())[:40] in said, f"lost: {text[:60]}"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt:"):
            assert token.string in code or token.string.lstrip("# ") in said, f"lost: {token.string}"


def test_names_lead_to_their_definitions(site):
    learner = (site / "source" / "learner.html").read_text()
    for address in (
        "../source/algorithms.html#auto_drift_coef",
        "../source/rollout.html#generate",
        "../source/learner.html#Learner.update",
    ):
        assert f'href="{address}"' in learner, address
    notebook = (site / "notebooks" / "01_cpgd_step_by_step.html").read_text()
    assert 'href="../source/learner.html#Learner"' in notebook
    assert 'href="../source/plots.tokens.html#token_text"' in notebook  # not where it is passed on
    assert 'href="metrics/kl_old.html"' in (site / "metrics.html").read_text()
    assert 'id="TrainConfig.num_iterations"' in (site / "source" / "config.html").read_text()


def test_prose_stands_on_the_left_and_code_on_the_right(site):
    for page in (site / "source").iterdir():
        openings = re.findall(r'<section class="part[^"]*">(<div class="said">)?', page.read_text())
        assert all(openings), page.name  # anything else would be a cell of the grid


def test_arguments_become_a_list(site):
    loss = (site / "source" / "algorithms.html").read_text()
    assert "<li><code>mask</code>: (B, T), true or 1 where a token belongs to the response" in loss
    assert "<strong>Raises</strong>" in loss
    assert loss.count("<summary>imports</summary>") == 1
    assert "<p>Aggregation: from a mask (B, T)" in loss  # a remark on several functions
    assert "Args:" not in "".join(read(site / "source" / "algorithms.html").text)


def test_solutions_are_folded_and_questions_stand_out(site):
    for page in (site / "notebooks").iterdir():
        body = page.read_text()
        assert body.count("<summary>Solution ") == 3, page.name
        assert body.count('class="predict"') >= 4, page.name
        assert body.count('<img class="figure"') >= 2, page.name


def test_search_finds_what_there_is(site):
    text = (site / "assets" / "search.js").read_text()
    entries = json.loads(text.removeprefix("window.SEARCH = ").rstrip(";\n"))
    for page, _, address, _ in entries:
        path, _, fragment = address.partition("#")
        assert not fragment or fragment in read(site / path).ids, f"{page}: {address}"
    hits = {address for _, heading, address, body in entries if "bounded_drift" in heading + body}
    assert {"source/divergence.html#bounded_drift"} <= hits


def test_a_broken_link_is_told():
    missing = []
    link = build.linker(ROOT / "docs" / "index.md", "", missing)
    assert link("results.md#1-the-map") == "results.html#1-the-map"
    assert link("../minicpgd/plots/runs.py") == "source/plots.runs.html"
    assert link("../results/map").startswith("https://")
    assert not missing
    link("../minicpgd/nowhere.py")
    assert missing == ["docs/index.md: ../minicpgd/nowhere.py"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="looks at pages in Chromium; there is none here")
def test_in_a_browser_without_a_network(site):
    """No error on any page; nothing wider than a telephone but what scrolls; search, menu and colours work."""
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
        tab.goto((site / "source" / "rollout.html").as_uri())
        tab.click("#menu")
        assert tab.is_visible("nav")
        tab.click("#menu")
        before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.click("#light")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
        tab.fill("#search", "bounded_drift")
        tab.wait_for_selector("#found a")
        tab.press("#search", "Enter")
        tab.wait_for_url("**/source/divergence.html#bounded_drift")
        assert not wrong
        browser.close()
