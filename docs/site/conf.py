# SPDX-License-Identifier: MIT
"""The pages of this repository as a site with search. From the repository's root, with the extra `docs`:

    sphinx-build -W --keep-going -c docs/site . build/site          # then open build/site/index.html

The Markdown is read where it lies and as GitHub reads it; README.md is the front page. -W: a link, an anchor or a
figure that leads nowhere is an error. Formulas are plain text and fonts the reader's own, so that nothing is loaded
from elsewhere, neither when the site is built nor when it is read.
"""

import os
import re
import shutil
from pathlib import Path

from docutils import nodes

project = "AdaGRPO"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md", "docs/site/source.rst"]
exclude_patterns = ["build", "runs"]
highlight_language = "text"  # of indented blocks: most are commands
myst_heading_anchors = 4  # as GitHub names them
html_theme = "furo"
html_title = project
html_static_path = html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).with_name("search.js"))
smartquotes = False  # or the two hyphens of a flag become a dash
html_copy_source = False
html_show_copyright = False

PARTS = {"Learn": ["docs/walkthrough", "docs/tutorial", "docs/equations", "docs/faq", "docs/metrics"],
         "See": ["docs/results", "docs/results-tables", "docs/toy", "docs/toy-log"],
         "Use": ["docs/data", "docs/sids", "docs/models", "docs/recommend", "docs/scale", "docs/vendoring",
                 "docs/benchmarks", "docs/benchmarks-log"], "More": []}


def contents(root):
    """The order of the pages, which README.md has no place for; a page that nobody put in order comes last."""
    pages = sorted(f"docs/{path.stem}" for path in (root / "docs").glob("*.md"))
    parts = {title: [name for name in names if name in pages] for title, names in PARTS.items()}
    parts["More"] += [page for page in pages if not any(page in names for names in parts.values())]
    parts["More"] += ["docs/site/source", "CHANGELOG"]
    return "".join(f"\n\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(names) + "\n```\n"
                   for title, names in parts.items())


def the_source(root):
    """The script and the core, to be read and found by the search."""
    for file in [root / "nanoadagrpo.py", *sorted((root / "adagrpo_core").glob("*.py"))]:
        name = file.relative_to(root).as_posix()
        yield f"\n{name}\n{'-' * len(name)}\n\n.. literalinclude:: ../../{name}\n   :language: python\n   :linenos:\n"


def complete(app, name, source):
    """What the site has and the Markdown does not. Links to the source or a folder lead to where it can be read."""
    root, here = Path(app.srcdir), (Path(app.srcdir) / name).parent
    read_at = dict.fromkeys([root / "nanoadagrpo.py", root / "adagrpo_core"], root / "docs/site/source.rst")
    read_at[root / "docs"] = root / "README.md"

    def lead(match):
        page = read_at.get((here / match[1]).resolve())
        return f"]({os.path.relpath(page, here)})" if page else match[0]

    source[0] = re.sub(r"\]\(([\w./-]+)\)", lead, source[0])
    source[0] = re.sub(r"(?<=  )eq\. (?=\d)", "eq.\u00a0", source[0])  # behind a formula, where a line may wrap
    if name == root_doc:
        source[0] += contents(root)
    if name == "docs/site/source":
        source[0] += "".join(the_source(root))


def small_print(app, doctree):
    """Names of tests, for site.css."""
    for code in doctree.findall(nodes.literal):
        if code.astext().startswith("test_"):
            code["classes"].append("test")


def front_page(app, error):
    if not error and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app):
    app.connect("source-read", complete)
    app.connect("doctree-read", small_print)
    app.connect("build-finished", front_page)
    return {"parallel_read_safe": True}
