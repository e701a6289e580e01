# SPDX-License-Identifier: MIT
"""The site is built by the README's command, and nothing in it leads nowhere. Needs the extra `docs`."""

import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
for module in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(module, reason="the extra docs is not installed")


def words():
    """The README's command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return shlex.split(re.search(r"&& (sphinx-build .*?)\s+#", text)[1])


def build(source, out):
    """The README's command, in another folder and with another place to write to."""
    command, *options, here, _ = words()
    assert command == "sphinx-build" and here == "."
    return subprocess.run([sys.executable, "-m", "sphinx", "-q", "-d", str(out) + "-doctrees", *options, ".", str(out)],
                          cwd=source, capture_output=True, text=True)


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")} - {None}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        for name in ("src", "href"):
            if tag in ("img", "script", "link", "iframe", "source") and attributes.get(name):
                self.loads.append(attributes[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "html"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_markdown_page_is_in_the_site_and_in_its_contents(site):
    front = Page(site / "index.html")
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        page = path.relative_to(ROOT).with_suffix(".html").as_posix()
        assert (site / page).is_file()
        assert page == "README.html" or page in {urlsplit(link).path for link in front.links}, page


def test_every_link_anchor_and_figure_of_the_site_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    dead, figures = [], set()
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (target in pages and anchor and anchor not in pages[target].anchors):
                dead.append((path.name, link))
            figures |= {target.name} if target.suffix == ".png" else set()
    assert dead == []
    drawn = re.findall(r"!\[[^\]]*\]\((?:[\w-]+/)*([\w-]+\.png)\)", "".join(
        path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]))
    assert drawn and set(drawn) <= figures


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert [link for link in Page(path).loads if urlsplit(link).netloc] == []
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8"))


def test_the_search_knows_the_words_of_pages_and_source(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for name in ("docs/faq", "docs/walkthrough", "docs/site/source", "README"):
        assert f'"{name}"' in index
    assert "in_batch_neg" in index and "hallucin" in index  # stems


def test_the_search_ranks_by_the_sites_own_rule_and_names_pages_that_exist(site):
    """Looked at in a browser: the changelog comes behind the pages that explain. Here: the rule is in the site."""
    rule = (ROOT / "docs/site/search.js").read_text(encoding="utf-8")
    assert rule in (site / "_static/language_data.js").read_text(encoding="utf-8")
    assert (site / "docs/walkthrough.html").is_file() and '"docs/walkthrough"' in rule


def test_signs_are_those_of_the_markdown(site):
    """Smart quotes would make a dash of the two hyphens of a flag."""
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        page = (site / path.relative_to(ROOT)).with_suffix(".html").read_text(encoding="utf-8")
        article = re.search(r"<article.*?</article>", page, flags=re.S)[0]
        assert set(article) & set("‘’“”–—") <= set(path.read_text(encoding="utf-8")), path.name


def test_the_style_sheet_is_loaded_and_finds_the_names_of_tests(site):
    page = site / "docs/equations.html"
    assert any(link.split("?")[0].endswith("_static/site.css") for link in Page(page).loads)
    assert (site / "_static/site.css").is_file()
    assert page.read_text(encoding="utf-8").count('class="test docutils literal') > 10


def test_no_formula_waits_for_a_renderer(site):
    """Formulas are plain text; dollars or backslashes in what is read would be formulas that nothing renders."""
    for path in site.rglob("*.html"):
        if path.name != "source.html":
            text = re.sub(r"<(pre|code|script|style).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.S)
            assert not re.search(r"\$[^$\n]+\$|\\\(|\\frac", re.sub(r"<[^>]*>", "", text)), path.name


def test_the_command_fails_on_what_leads_nowhere(tmp_path):
    copy = tmp_path / "copy"
    for name in ("docs", "adagrpo_core"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "nanoadagrpo.py"):
        shutil.copy(ROOT / name, copy)
    with (copy / "README.md").open("a", encoding="utf-8") as file:
        file.write("\n[a](no1.md) ![b](no2.png) [c](docs/faq.md#no3) [d](#no4)\n")
    done = build(copy, tmp_path / "out")
    assert done.returncode != 0
    assert [wrong for wrong in ("no1", "no2", "no3", "no4") if wrong not in done.stderr] == []
