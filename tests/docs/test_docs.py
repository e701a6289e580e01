# SPDX-License-Identifier: MIT
"""README and docs are true: their code prints what they say, their links lead somewhere, their names exist."""

import ast
import contextlib
import io
import itertools
import json
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
from fences import FENCE, blocks
from test_data_page import EXAMPLES, TINY, unpack

import adagrpo_core as core
import nanoadagrpo as nano

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]}
every_page = pytest.mark.parametrize("page", PAGES)
WALKTHROUGH, EQUATIONS, METRICS = (PAGES[f"docs/{name}.md"] for name in ("walkthrough", "equations", "metrics"))


def prose(text):
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def code_spans(text):
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


# -- code blocks -------------------------------------------------------------------------------------------------------

# Blocks that need something first are run by tests/recipes/test_vendoring_page.py, tests/nano/test_models.py and
# test_models_page.py, test_recommend_page.py, test_data_page.py and test_tutorial_page.py.
ELSEWHERE = {"docs/vendoring.md", "docs/models.md", "docs/recommend.md", "docs/data.md", "docs/tutorial.md"}
RUNNABLE = [page for page, text in PAGES.items() if "```python" in text and page not in ELSEWHERE]


def play(text):
    """(code, what the page says it prints, what it prints) of each block, one after the other in one namespace."""
    fences = [(match[1], match[2], match.start(), match.end()) for match in FENCE.finditer(text)]
    names = {"__name__": "page"}
    for i, (language, code, _, end) in enumerate(fences):
        if language != "python":
            continue
        follows = fences[i + 1] if i + 1 < len(fences) else None
        says = follows[1] if follows and follows[0] == "text" and not text[end : follows[2]].strip() else ""
        says = follows[1] if says else ""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "page", "exec"), names)
        yield code, says, printed.getvalue()


@pytest.mark.parametrize("page", RUNNABLE)
def test_every_block_of_python_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code, says, prints in play(PAGES[page]):
        assert prints == says, code


def test_a_page_that_says_something_else_is_noticed():
    page = "```python\nx = 1\n```\n\ntext\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n"
    assert [(says, prints) for _, says, prints in play(page)] == [("", ""), ("2\n", "1\n")]


def test_the_pages_that_teach_have_blocks_that_run():
    assert {"docs/walkthrough.md", "docs/equations.md"} <= set(RUNNABLE)
    assert len(list(play(WALKTHROUGH))) >= 8


# -- links, paths, commands --------------------------------------------------------------------------------------------


def anchors(text):
    """The names that a Markdown renderer gives to headings."""
    seen = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), flags=re.M):
        slug = re.sub(r"\]\([^)]*\)", "", heading).lower().strip()
        slug = re.sub(r"[^\w\- ]", "", slug).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        yield slug + (f"-{seen[slug]}" if seen[slug] else "")


def links(text):
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)", lambda span: "x" * len(span[0]), prose(text))
    text = re.sub(r"^(    |\t)(?! *[*\-\d]).*$", "", text, flags=re.M)  # indented code
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.M)
    return found + re.findall(r"(?:src|href)=[\"']([^\"']+)", text)


def broken(page, text):
    for link in links(text):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        leads = file.resolve().is_relative_to(ROOT) and file.exists()
        if not leads or (anchor and anchor not in anchors(file.read_text(encoding="utf-8") if path else text)):
            yield link


@every_page
def test_every_relative_link_image_and_anchor_leads_somewhere(page):
    assert list(broken(page, PAGES[page])) == []


def test_links_that_lead_nowhere_are_noticed():
    text = ("# Two words, `x`\n[a](nowhere.md) ![b](no.png) [c](#two-words-x) [d](#three) [e](https://a.b/c) "
            "[f](../../x.md) `[g](h.md)`\n[i]: gone.md\n\n    [k](indented.md)\n")
    assert list(broken("README.md", text)) == ["nowhere.md", "no.png", "#three", "../../x.md", "gone.md"]


@every_page
def test_every_path_of_this_repository_that_is_named_exists(page):
    named = [span for span in code_spans(PAGES[page]) if re.fullmatch(r"(docs|tests|adagrpo_core)/[\w./-]+", span)]
    named += re.findall(r"\bpython ((?:\w[\w-]*/)*\w+\.py)\b", PAGES[page])
    assert [path for path in named if not (ROOT / path).exists()] == []


# Words in capitals that the reader replaces, and what they are replaced with here.
PLACEHOLDERS = {"DIR": "somewhere", "MODEL": "somewhere", "RUN": "runs/mine"}


def commands(text):
    """What follows `python nanoadagrpo.py` on every line that has it, comments and the next command cut off."""
    text = re.sub(r"\\\n\s*", " ", text)
    for rest in re.findall(r"python nanoadagrpo\.py\b([^`\n]*)", text):
        words = shlex.split(re.split(r"&&|\|(?!\|)|;|\s[>(]", rest)[0], comments=True)
        yield [re.sub(r"^[A-Z]+\b", lambda name: PLACEHOLDERS.get(name[0], name[0]), word) for word in words]


@every_page
def test_every_command_line_that_is_quoted_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text(json.dumps({"data": "somewhere"}))
    for words in commands(PAGES[page]):
        unknown = [word for word in words if re.fullmatch(r"[A-Z]+|\.\.\.|<.*>", word)]
        assert not unknown, "say in PLACEHOLDERS what stands for them here"
        if words:  # the bare name of the script is a mention
            assert nano.parse([*words, "--device", "cpu"])


def test_commands_are_found_however_they_are_quoted():
    text = ("    python nanoadagrpo.py --toy   # a comment\n`python nanoadagrpo.py --data DIR` reads\n"
            "```\npip install . && python nanoadagrpo.py --toy \\\n    --seed 3 && ls\n```\n")
    assert list(commands(text)) == [["--toy"], ["--data", "somewhere"], ["--toy", "--seed", "3"]]
    assert sum(len(list(commands(text))) for text in PAGES.values()) >= 4
    with pytest.raises(nano.UserError):
        nano.parse(["--toy", "--no-such-flag", "1"])


ABOUT_THE_SCRIPT = ["README.md", "docs/walkthrough.md", "docs/equations.md", "docs/metrics.md", "docs/toy.md",
                    "docs/data.md", "docs/models.md", "docs/sids.md", "docs/benchmarks.md", "docs/benchmarks-log.md",
                    "docs/tutorial.md"]


@pytest.mark.parametrize("page", ABOUT_THE_SCRIPT)
def test_every_flag_that_is_named_is_one_of_the_scripts(page):
    flags = {"--help", *map(nano.to_flag, nano.Settings.__dataclass_fields__)}
    named = [word for span in code_spans(PAGES[page]) for word in re.findall(r"(?<!\S)--[a-z][\w-]*", span)
             if "evidence" not in span]
    assert set(named) <= flags


@every_page
def test_every_extra_that_is_installed_exists(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for group in re.findall(r"'\.\[([\w,]+)\]'", PAGES[page]) for extra in group.split(",")}
    assert named <= set(extras)


@every_page
def test_a_page_can_be_read_without_a_renderer(page):
    text = FENCE.sub("", PAGES[page])
    assert "```" not in text, "a fence is not closed"
    assert not re.search(r"/(home|root|Users)/", PAGES[page]), "a path of somebody's machine"


# -- tables ------------------------------------------------------------------------------------------------------------


def table(text, heading=None):
    """Cells of the first table, or of the first below a heading, without its head."""
    if heading:
        text = text.split(f"\n## {heading}\n")[1]
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@every_page
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    for is_table, lines in itertools.groupby(PAGES[page].splitlines(), lambda line: line.startswith("|")):
        if is_table:
            assert len({re.sub(r"`[^`]*`", "", line).replace("\\|", "").count("|") for line in lines}) == 1


def names(cell):
    return re.findall(r"`(\w+)`", cell)


def every_test():
    """The name of every test there is."""
    for file in sorted((ROOT / "tests").glob("*/test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield node.name


# -- docs/equations.md -------------------------------------------------------------------------------------------------

EQUATION, SAYS, CORE, SCRIPT, PINNED, OPEN = range(6)
EQUATION_ROWS, CHOICE_ROWS = table(EQUATIONS), table(EQUATIONS, "What the paper leaves open")


def test_every_equation_of_the_paper_has_its_row():
    assert [row[EQUATION] for row in EQUATION_ROWS][:10] == [str(number) for number in range(1, 11)]


def test_every_function_in_the_table_exists_and_no_public_one_is_missing():
    for row in EQUATION_ROWS:
        assert set(names(row[CORE])) <= set(core.__all__), row
        assert all(hasattr(nano, name) for name in names(row[SCRIPT])), row
    functions = {name for name in core.__all__ if not isinstance(getattr(core, name), type)}
    assert functions <= set(re.findall(r"`(\w+)`", EQUATIONS))


def test_the_function_of_an_equation_cites_it():
    for row in EQUATION_ROWS[:10]:
        documented = [getattr(core, name).__doc__ for name in names(row[CORE])]
        assert any(re.search(rf"\(eq\. (\d+, )*{row[EQUATION]}\b", text) or
                   re.search(rf"eq\. {row[EQUATION]}\b", text) for text in documented), row


def test_the_script_uses_the_core_where_the_table_says():
    source = (ROOT / "nanoadagrpo.py").read_text()
    bodies = {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
              if isinstance(node, ast.FunctionDef)}
    bodies["METHODS"] = source.split("METHODS = {")[1].split("\n}")[0]
    for number, function in {"2": "nll_loss", "3": "group_advantages", "4": "grpo_loss", "7": "difficulty",
                             "8": "in_batch_negatives", "9": "reliability", "10": "sample_clip"}.items():
        row = EQUATION_ROWS[int(number) - 1]
        assert function in names(row[CORE])
        assert any(f"core.{function}(" in bodies[name] for name in names(row[SCRIPT])), row


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", "".join(PAGES.values())))
    assert named and named <= set(every_test())


def test_every_row_names_a_test_and_every_choice_is_asked_by_an_equation():
    assert all("`test_" in row[PINNED] for row in EQUATION_ROWS)
    assert all("`test_" in row[-1] for row in CHOICE_ROWS)
    letters = [row[0] for row in CHOICE_ROWS]
    assert letters == sorted(set(letters))
    assert {letter for row in EQUATION_ROWS for letter in re.findall(r"\w", row[OPEN])} == set(letters)


# -- docs/walkthrough.md -----------------------------------------------------------------------------------------------


SOURCE = (ROOT / "nanoadagrpo.py").read_text(encoding="utf-8")
SCRIPT_PAGES = WALKTHROUGH.split("\n## The script, from top to bottom\n")[1].split("\n## ")[0]


def sections(text, heading):
    """[(title, what stands below it)] and before them what stands above the first."""
    above, *rest = re.split(heading, text, flags=re.M)
    return above, list(zip(rest[::2], rest[1::2], strict=True))


PARTS = list(zip(sections(SOURCE, r"^# == (.+?) =+$")[1], sections(SCRIPT_PAGES, r"^### (.+)$")[1], strict=True))


def defined(code):
    """The functions, classes and constants of a piece of the script."""
    return set(re.findall(r"^(?:def |class |(?=[A-Z_]+ = ))(\w+)", code, flags=re.M))


@pytest.mark.parametrize("part, page", PARTS, ids=["I", "II", "III"])
def test_the_walkthrough_has_the_parts_and_rooms_of_the_script_in_their_order(part, page):
    assert part[0] == page[0]
    first, rooms = sections(part[1], r"^# -- (.+?)(?: -+)?$")
    rooms = [("", first), *rooms] if defined(first) else rooms
    headings = sections(page[1], r"^#### (.+)$")[1]
    for (banner, code), (heading, text) in zip(rooms, headings, strict=True) if headings else ():
        assert not banner or banner.lower().startswith(heading.lower())
        assert defined(code) & set(names(text)), heading
    for name in names(page[1]):
        known = name in defined(SOURCE) or name in core.__all__ or re.search(rf"\b{name}\b", part[1])
        assert known, f"`{name}` is nothing in this part of the script, nor in the core"
    assert len(defined(part[1]) & set(names(page[1]))) >= 8


def test_pieces_of_the_script_that_the_walkthrough_shows_stand_there_in_this_order():
    pieces = [code for language, code in FENCE.findall(SCRIPT_PAGES) if language == "py"]
    places = [max(SOURCE.find(textwrap.indent(piece, " " * n)) for n in range(0, 24, 4)) for piece in pieces]
    assert len(pieces) >= 2 and min(places) > 0 and places == sorted(places)


# -- docs/metrics.md ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The keys of every kind of line that runs write: all methods and fifty beams, and a log with rows kept out."""
    threads, whole = torch.get_num_threads(), nano.toy_world
    torch.set_num_threads(1)
    small = nano.World(codes=6, items=60, users=60, impressions=8)
    folder = tmp_path_factory.mktemp("runs")
    unpack(EXAMPLES[0], folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "toy_world", lambda cfg: whole(cfg, small))
        nano.main(["--toy", "--method", "all", "--device", "cpu", "--out", str(folder / "all"), "--sft-steps", "2",
                   "--sft-batch-size", "8", "--rl-steps", "1", "--batch-size", "4", "--group-size", "6",
                   "--rl-prompts", "20", "--eval-prompts", "8", "--beam-width", "50"])
        log = folder / "data" / "log.jsonl"
        log.write_text(log.read_text().replace('"order": [0]', '"order": [1]'))  # so that orders can be judged
        nano.main(["--data", str(folder / "data"), "--log-holdout", "0.5", "--keep", "best",
                   "--out", str(folder / "log"), *TINY, "--beam-width", "10"])
    torch.set_num_threads(threads)
    keys = {}
    for line in [line for path in folder.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]:
        row = json.loads(line)
        keys.setdefault(row["phase"], set()).update(row)
    return keys


ANY = {"phase", "seconds"}  # documented before and after the tables
EVERY, RL, EVALUATION = "Every training step", "Every RL step, beside those", "Every evaluation"
RANKER, INFLUENCE = "The ranker, on rows kept out", "Influence of the ranker"


def documented(heading):
    return {key for row in table(METRICS, heading) for key in re.findall(r"`([\w@]+)`", row[0])}


def at_k(keys):
    """hr@1, hr@10 and hr@50 are one key, hr@k; ndcg@10 has no other k."""
    return {re.sub(r"^(hr|\w+_reward)@(1|10|50)$", r"\1@k", key) for key in keys}


def test_every_training_step_logs_the_documented_keys_and_no_other(logged):
    assert documented(EVERY) == logged["sft"] - ANY
    assert documented(RL) == logged["rl"] - logged["sft"]
    assert logged["sft"] <= logged["rl"]


def test_every_evaluation_logs_the_documented_keys_and_no_other(logged):
    where = {"method", "step"} | ANY
    assert documented(EVALUATION) == at_k(logged["test"]) - where
    assert documented(EVALUATION) - {"admitted", "kept_step"} == at_k(logged["valid"]) - where
    assert {"hr@1", "hr@10", "hr@50", "click_reward@1", "order_reward@50"} <= logged["test"]


def test_the_ranker_logs_the_documented_keys_and_no_other(logged):
    assert documented(RANKER) == logged["ranker"] - {"step"} - ANY


def test_the_influence_of_the_ranker_is_logged_under_the_documented_keys_and_no_other(logged):
    patterns = [key for row in table(METRICS, INFLUENCE) for key in re.findall(r"`([\w/]+)`", row[0])]
    keys = {pattern.replace("WHO", who).replace("STRATUM", stratum) for pattern in patterns
            for who in ("ranker", "chance") for stratum in core.RewardInfluence._fields}
    # With few prompts a stratum may be empty: then the page says that only its coverage is there.
    assert logged["influence"] - {"step"} - ANY <= keys
    assert {key for key in keys if not re.search("(hard|discriminable)/(llm|rm|inf)", key)} <= logged["influence"]


def test_the_verdict_on_the_ranker_is_decided_as_the_page_says():
    """Clear beyond two standard errors of the difference, at every size; else nothing is to be expected."""
    assert "R − R₀ > 2 √((R(1 − R) + R₀(1 − R₀)) / n)" in METRICS
    for n, R, chance in itertools.product((10, 100, 1000), (0.0, 0.05, 0.1, 0.3, 1.0), (0.0, 0.05, 0.1)):
        says = nano.influence_table({"prompts": n, "beams": 50, "ranker/reliable": R, "chance/reliable": chance})
        clear = R - chance > 2 * ((R * (1 - R) + chance * (1 - chance)) / n) ** 0.5
        shut = R == chance == 0
        assert ("the ranker separates" in says) == clear
        assert ("the gate is shut for any ranker among these beams" in says) == shut
        less = chance - R > 2 * ((R * (1 - R) + chance * (1 - chance)) / n) ** 0.5
        assert ("clearly less often" in says) == less
        assert ("no clear difference" in says) == (not clear and not shut and not less)
        assert (f"{R / chance if chance else 0:.1f} times as often" in says) == (clear and chance > 0)


def test_the_phases_are_those_that_the_page_names(logged):
    introduction = METRICS.split("\n## ")[0]
    assert all(f"`{phase}`" in introduction for phase in logged)
    assert set(logged) == {"ranker", "sft", "influence", "rl", "valid", "test"}


def test_every_key_that_the_pages_words_mention_is_logged(logged):
    known = set.union(*logged.values()) | at_k(set.union(*logged.values()))
    mentioned = {span for span in code_spans(METRICS) if re.fullmatch(r"[a-z]+(_[a-z]+)*(@\w+)?", span)}
    other = {"min", "max", "average", *logged, *nano.METHODS}  # the tie rules, the phases, the methods
    other |= {"overall", "hard", "discriminable", "chance", "order"}  # parts of keys of the influence; of a log
    other |= {"memory"}  # on a GPU
    assert mentioned - other <= known


def parts_of(text):
    """(what people wrote, what the drivers wrote) of a page."""
    driver = "(?:toy|real|tuned)"
    pieces = re.split(rf"<!-- {driver}(?:: this part is written by .*?)? -->|<!-- /{driver} -->", text)
    return "".join(pieces[::2]), "".join(pieces[1::2])


def test_what_the_results_say_is_what_the_tables_say(monkeypatch):
    """Each number with an interval that people wrote stands in a part that a driver wrote."""
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "results-tables.md")]
    said, written = zip(*map(parts_of, pages), strict=True)
    numbers = re.findall(r"[+-]\d+\.\d\d \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]", " ".join(" ".join(said).split()))
    monkeypatch.syspath_prepend(ROOT / "docs" / "evidence")
    import arithmetic
    import report

    arms = json.loads((ROOT / "docs" / "evidence" / "random-at-d.json").read_text())
    later = [report.signed(arithmetic.over_seeds([x - y for x, y in zip(*pair, strict=True)][seeds]))
             for key in ("hr@10", "utility@10") for pair in itertools.permutations(arms[key].values(), 2)
             for seeds in (slice(10), slice(10, 20), slice(20))]  # each set, and both
    assert len(numbers) > 4 and [number for number in numbers if number not in "".join([*written, *later])] == []


def test_the_code_of_random_at_ds_rate_runs_and_admits_as_many_of_each_batch_as_d(monkeypatch):
    (code,) = blocks((ROOT / "docs" / "results.md").read_text(encoding="utf-8"), "py")
    given = []
    monkeypatch.setattr(nano, "METHODS", dict(nano.METHODS))
    monkeypatch.setattr(nano, "main", lambda argv: given.append(nano.parse(argv)))
    exec(code, {})
    assert [cfg.seed for cfg in given] == json.loads((ROOT / "docs/evidence/random-at-d.json").read_text())["seeds"]
    D, generator = torch.arange(64) < 35, torch.Generator().manual_seed(0)
    admitted = [nano.METHODS["random-at-d"].admit(D, ~D, None, generator) for _ in range(400)]
    assert {x.sum().item() for x in admitted} == {35}
    assert (torch.stack(admitted).double().mean(0) - 35 / 64).abs().max() < 0.12  # five standard errors


def test_the_toys_findings_are_what_its_tables_say():
    """Each number with a sign and two digits, and its interval, stands in a table too."""
    page, tables = ((ROOT / "docs" / name).read_text(encoding="utf-8").replace("−", "-")
                    for name in ("results.md", "results-tables.md"))
    rest = page.partition("### What it says")[2]
    said, _, after = rest.partition("\n### ")
    numbers = re.findall(r"[+-]\d+\.\d\d(?: \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\])?", " ".join(said.split()))
    assert len(numbers) > 10 and [number for number in numbers if number not in tables + after] == []


def test_the_results_can_be_read():
    """At most 3,500 words beside the tables, and a figure before the first heading."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= 3500 and "](figures/" in text.partition("\n## ")[0]
