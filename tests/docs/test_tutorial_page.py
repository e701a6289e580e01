# SPDX-License-Identifier: MIT
"""docs/tutorial.md: its code makes the files, its command trains on them, and what it says is printed is printed."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from fences import blocks

import nanoadagrpo as nano

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES, RECOMMEND = blocks(PAGE)
SAYS_FILES, SAYS_SCREEN, SAYS_ITEMS = blocks(PAGE, "text")
COMMAND = re.search(r"^    python nanoadagrpo\.py (.*)$", PAGE, flags=re.M)[1]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The folder in which the page was followed, and what its two blocks and its command print."""
    folder, threads = tmp_path_factory.mktemp("tutorial"), torch.get_num_threads()

    def play(do, *given):
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            do(*given)
        return screen.getvalue()

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        files = play(exec, compile(FILES, "page", "exec"), {})
        screen = play(nano.main, [*shlex.split(COMMAND), "--device", "cpu"])
        yield folder, files, screen, play(exec, compile(RECOMMEND, "page", "exec"), {})
    torch.set_num_threads(threads)


def read(folder, name):
    return list(map(json.loads, (folder / "shop" / f"{name}.jsonl").read_text().splitlines()))


def kind(line):
    """What a line says on every machine: of a table's row, the title and the number of cells; else no digits."""
    if line.startswith("|"):
        title, *cells = line.strip("|").split("|")
        return title.strip(), len(cells)
    line = re.sub(r"; (\S+ times as often: the ranker separates|(no clear|clearly less).*)\.$", "; VERDICT", line)
    return re.sub(r"[\d.]+", "N", re.sub(r"^script .*", "script", line))


def test_the_files_are_those_of_the_page_and_nothing_is_learnt_from_the_future(played):
    folder, files, *_ = played
    assert files == SAYS_FILES
    names = ("train", "rl", "valid", "test")
    assert sum(len(read(folder, name)) for name in names) == 200 and "200 purchases" in PAGE
    assert sum(len(row["shown"]) for row in read(folder, "log")) == 2000 and "2,000 shown items" in PAGE
    lives = [[*row["history"], row["target"]] for row in read(folder, "test")]  # one item owned, five bought
    assert {len(life) for life in lives} == {6}
    for name in ("train", "rl", "log"):
        for row in read(folder, name):
            known = [*row["history"], *([row["target"]] if "target" in row else [])]
            assert len(known) <= 4 and any(life[: len(known)] == known for life in lives)


def test_the_command_prints_the_lines_that_the_page_explains(played):
    """Digits may differ between machines; lines, columns and methods do not."""
    says, prints = SAYS_SCREEN.strip().splitlines(), played[2].strip().splitlines()
    before, says = says[: len(says) - len(prints)], says[len(says) - len(prints) :]
    assert list(map(kind, prints)) == list(map(kind, says))
    source = (ROOT / "nanoadagrpo.py").read_text(encoding="utf-8")
    assert all(f'print("{line}"' in source for line in before), "what is printed while the script is loaded"
    explained = set(re.findall(r"`(\d[\d.]*%?)`", PAGE))
    assert explained and all(number in SAYS_SCREEN for number in explained)


def test_there_is_something_to_learn_and_it_is_learnt(played):
    """The ranker is far from guessing, and so is the policy: ten of the 90 items drawn blindly give 11 %."""
    rows = list(map(json.loads, (played[0] / "runs/tutorial/metrics.jsonl").read_text().splitlines()))
    [auc] = [row["click_auc"] for row in rows if row["phase"] == "ranker"]
    hits = {row["method"]: row["hr@10"] for row in rows if row["phase"] == "test"}
    assert auc > 0.7 and list(hits) == ["base", "nll", "random-gate", "adagrpo"] and min(hits.values()) > 0.4
    assert all(row["invalid_rollouts"] == 0 for row in rows if "invalid_rollouts" in row)


def test_the_folder_holds_what_the_page_says(played):
    out = played[0] / "runs" / "tutorial"
    names = PAGE.split("## 4. The folder")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w/-]+(?:\.\w+)?)`", names)) - {"valid", "runs/tutorial/"}
    assert {"report.md", "policy/adagrpo"} <= named and all((out / name).exists() for name in named)
    report = (out / "report.md").read_text()
    order = ["python nanoadagrpo.py --data shop", "HR@1 %", "ranker: learnt from", "## Influence"]
    places = [report.index(text) for text in order]
    assert places == sorted(places)


def test_the_page_of_recommendations_goes_on_from_there(played, monkeypatch):
    """docs/recommend.md as it stands, in the same folder: nothing has to be changed first."""
    folder, names, screen = played[0], {}, io.StringIO()
    monkeypatch.chdir(folder)
    page = (ROOT / "docs" / "recommend.md").read_text(encoding="utf-8")
    with contextlib.redirect_stdout(screen):
        for block in blocks(page):
            exec(compile(block, "page", "exec"), names)
    catalogue = json.loads((folder / "shop" / "catalogue.json").read_text())
    [says] = blocks(page, "text")
    for text in (says, screen.getvalue()):
        found = re.findall(r"^(\d+) (\[.*\])$", text, flags=re.M)
        assert len({name for name, _ in found}) == 5 == len(text.splitlines())
        assert all(str(catalogue[int(name)]) == item for name, item in found)
    rows = list(map(json.loads, (folder / "items.jsonl").read_text().splitlines()))
    assert [len(row["items"]) for row in rows] == [10] * 40 and "forty people" in page
    for row, life in zip(rows, read(folder, "test"), strict=True):
        items = [catalogue[int(name)] for name in row["items"]]
        assert not any(item in items for item in [*life["history"], life["target"]])
    targets = [row["target"] for name in ("train", "rl") for row in read(folder, name)]
    cold = [catalogue[int(name)] not in targets for row in rows for name in row["items"]]
    assert 0.35 < sum(cold) / len(cold) < 0.7 and "about half of the places go to such items" in page


def test_an_item_that_is_none_is_refused_by_name(played, monkeypatch):
    monkeypatch.chdir(played[0])
    code = RECOMMEND.replace('row = json', 'words(["bike", "book", 9])\nrow = json')
    with pytest.raises(ValueError, match=r"^\['bike', 'book', 9\]: is no item of shop/catalogue.json$"):
        exec(compile(code, "page", "exec"), {})


def test_the_recommendations_are_five_items(played):
    folder, *_, printed = played
    items = {tuple(item) for item in json.loads((folder / "shop" / "catalogue.json").read_text())}
    for text in (printed, SAYS_ITEMS):
        *lines, bought = text.splitlines()
        found = [re.fullmatch(r"(\d) <a_(\w+)> <b_(\w+)> <c_(\d)>", line).groups() for line in lines]
        assert [place for place, *_ in found] == list("12345")
        assert len({(a, b, int(c)) for _, a, b, c in found} & items) == 5
        assert bought == SAYS_ITEMS.splitlines()[-1]
