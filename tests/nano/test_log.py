# SPDX-License-Identifier: MIT
"""The exposure log: read in both layouts, learnt from row by row, judged on rows that the ranker has not seen."""

import contextlib
import csv
import json

import pytest
import torch
import torch.nn.functional as F

import nanoadagrpo as nano

from .helpers import DEVICE, QUICK, SHOP, logged, refused, run, settings
from .shops import CODES, TRAIN, csv_row, jsonl, jsonl_row, minionerec, write_csv, written

# (history, shown, click, order): rows of different lengths, a new user, two items that share a Semantic ID.
LOG = [([0], [1, 2, 5], [1, 0, 0], [1, 0, 0]), ([], [3, 9], [0, 1], [0, 0]), ([5, 4, 2], [7], [1], [1]),
       ([1, 2], [0, 8, 6, 4], [0, 0, 1, 1], [0, 0, 0, 1]), ([9], [5, 5], [1, 1], [0, 1]),
       ([6, 1], [2, 7], [0, 0], [0, 0]),
       ([4], [8, 0, 3], [0, 1, 0], [0, 0, 0]), ([], [6], [0], [0]), ([2], [4, 1], [1, 0], [1, 0]),
       ([7, 8], [1, 5, 2], [1, 1, 0], [0, 1, 0])]
FIELDS = ["history", "shown", "click", "order"]


def log_jsonl(folder, rows=LOG, fields=FIELDS, codes=CODES):
    def spell(field, x):
        return x if field in ("click", "order") else [codes[item] for item in x]

    lines = [json.dumps({field: spell(field, x) for field, x in zip(fields, row, strict=False)}) + "\n" for row in rows]
    (folder / "log.jsonl").write_text("".join(lines))
    return folder


def log_csv(folder, rows=LOG, fields=FIELDS, spell=written):
    names = {"history": "history_item_sid", "shown": "shown_item_sid"}
    cells = [[repr(x if field in ("click", "order") else [spell(item) for item in x])
              for field, x in zip(fields, row, strict=False)] for row in rows]
    write_csv(folder / "log.csv", cells, [names.get(field, field) for field in fields])
    return folder


LAYOUTS = {"MiniOneRec": lambda folder, *what: log_csv(minionerec(folder), *what),
           "JSONL": lambda folder, *what: log_jsonl(jsonl(folder), *what)}
both = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def load(folder, **changes):
    return nano.load_data(str(folder), settings(**{"log_holdout": 0.0, **changes}))


def same_log(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None or b is not None)


# -- what is read is what was written ----------------------------------------------------------------------------------


@both
def test_every_row_is_read_as_it_was_written(tmp_path, layout):
    data = load(layout(tmp_path / "shop"))
    history, shown, click, order = data.log
    assert data.holdout is None and shown.shape == click.shape == order.shape == (10, 4) and history.shape == (10, 3)
    names = list(data.catalogue.row)
    for i, (past, items, clicked, ordered) in enumerate(LOG):
        n = len(items)
        for written_ones, found in ((past, history[i]), (items, shown[i])):
            codes = [tuple(int(str(code).strip("<abc_>")) for code in names[item]) for item in found if item >= 0]
            assert codes == [CODES[item] for item in written_ones]
        assert shown[i, n:].eq(-1).all() and not click[i, n:].any() and not order[i, n:].any()
        assert (click[i, :n].tolist(), order[i, :n].tolist()) == ([*map(bool, clicked)], [*map(bool, ordered)])
        assert (history[i, : 3 - len(past)] == -1).all(), "a history is padded on the left"


def test_both_layouts_say_the_same_and_truth_values_may_be_words(tmp_path):
    words = [(past, items, [*map(bool, click)], order) for past, items, click, order in LOG]
    logs = [load(make(tmp_path / f"{name}{i}", rows)).log for name, make in LAYOUTS.items()
            for i, rows in enumerate((LOG, words))]
    assert all(same_log(logs[0], log) for log in logs[1:])
    assert "true" in (tmp_path / "JSONL1" / "log.jsonl").read_text()


@both
def test_only_the_most_recent_items_of_a_history_are_used(tmp_path, layout):
    folder = layout(tmp_path / "shop")
    assert torch.equal(load(folder, max_history=2).log.history, load(folder).log.history[:, -2:])


@both
def test_without_a_log_in_the_folder_the_training_rows_are_it(tmp_path, layout):
    with_log, source = load(layout(tmp_path / "with")), "train"
    (tmp_path / "with" / ("log.csv" if (tmp_path / "with" / "index.json").exists() else "log.jsonl")).unlink()
    without = load(tmp_path / "with")
    assert torch.equal(without.log.item[:, 0], without.sft.target) and without.source.startswith(source)
    for split in ("sft", "rl", "valid", "test"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(with_log, split), getattr(without, split), strict=True))


@both
def test_the_prompts_of_the_method_are_in_rl_if_it_is_there_and_in_train_if_not(tmp_path, layout):
    folder = layout(tmp_path / "shop")
    rows = [([0, 2], 5), ([4], 8), ([1], 6)]
    assert sorted(load(folder).rl.target.tolist()) == sorted(load(folder).sft.target.tolist())
    if (folder / "index.json").exists():
        write_csv(folder / "rl.csv", [csv_row(*row) for row in rows])
    else:
        (folder / "rl.jsonl").write_text("".join(jsonl_row(*row) for row in rows))
    data = load(folder)
    found = zip(data.rl.history[:, -1].tolist(), data.rl.target.tolist(), strict=True)
    assert sorted(found) == [(1, 6), (2, 5), (4, 8)] and len(data.sft.target) == len(TRAIN)
    assert len(load(folder, rl_prompts=2).rl.target) == 2


# -- what cannot be used -----------------------------------------------------------------------------------------------

ROW = {"history": [[0, 0, 0]], "shown": [[0, 0, 1], [0, 1, 0]], "click": [1, 0], "order": [1, 0]}
NAN, WITHOUT = float("nan"), object()
UNEQUAL, VALUES, NO_CLICK = "are not equally long", ": got ", "an order without a click"
FAULTS = {
    "a click too few": (dict(click=[1]), UNEQUAL), "a click too many": (dict(click=[1, 0, 0]), UNEQUAL),
    "an order too few": (dict(order=[1]), UNEQUAL), "an order too many": (dict(order=[1, 0, 0]), UNEQUAL),
    "an item too few": (dict(shown=[[0, 0, 1]]), UNEQUAL),
    **{f"click {x!r}": (dict(click=[x, 0]), VALUES) for x in (2, -1, "1", None, 0.5, 1.0, [1], 10**30)},
    **{f"order {x!r}": (dict(order=[x, 0]), VALUES) for x in (2, "0", None, 0.5)},
    "an order without a click": (dict(order=[0, 1]), NO_CLICK),
    "no order here": (dict(order=WITHOUT), "all rows or in none"),
    "nothing shown": (dict(shown=[], click=[], order=[]), "got "),
    "no clicks": (dict(click=[]), "got "), "no orders": (dict(order=[]), "got "),
    "click is a number": (dict(click=1), "got "), "click is a text": (dict(click="10"), "got "),
    "click is missing": (dict(click=WITHOUT), "got "), "shown is missing": (dict(shown=WITHOUT), "got "),
    "history is missing": (dict(history=WITHOUT), "got "),
}


def with_row(fault, ending):
    """A folder `shop` whose log has good rows, but for the second."""
    row = {field: x for field, x in (ROW | fault).items() if x is not WITHOUT}
    if ending == "jsonl":
        log_jsonl(jsonl(nano.Path("shop")), LOG[:3])
        path, good = nano.Path("shop/log.jsonl"), nano.Path("shop/log.jsonl").read_text().splitlines()
        path.write_text("\n".join([good[0], json.dumps(row), *good[1:]]) + "\n")
        return path, 2
    log_csv(minionerec(nano.Path("shop")), LOG[:3])
    path = nano.Path("shop/log.csv")
    header, *rows = csv.reader(path.read_text().splitlines())
    lists = ((["".join(f"<{a}_{x}>" for a, x in zip("abc", sid, strict=True)) for sid in row[field]]
              if field in ("history", "shown") else row[field]) if field in row else "" for field in FIELDS)
    cells = [x if isinstance(x, str) else repr(x) for x in lists]
    write_csv(path, [rows[0], cells[:3] if cells[3] == "" else cells, *rows[1:]], header)
    return path, 3


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("fault, reason", FAULTS.values(), ids=FAULTS)
def test_a_row_that_cannot_be_used_is_refused_by_file_and_line(folder, capsys, fault, reason, ending):
    path, number = with_row(fault, ending)
    line = refused(capsys, run)
    reason = "order: got ''" if fault == dict(order=WITHOUT) and ending == "csv" else reason
    assert line.startswith(f"nanoadagrpo: {path}, line {number}: ") and reason in line and "drop the row" in line
    if reason == "got ":
        column = next(iter(fault)) + "_item_sid" * (ending == "csv" and next(iter(fault)) in ("history", "shown"))
        assert f": {column}: got " in line
    if reason == VALUES:
        [(field, value)] = fault.items()
        got = repr(str(value)) if ending == "csv" else repr(value)
        assert f"{field}: got {got}; " in line


@pytest.mark.parametrize("text, reason", [
    ('{"history": [], "shown": [[0, 0, 1]], "click": [NaN], "order": [0]}', VALUES),
    ('{"history": [], "shown": [[0, 0, 1]], "click": [1], "order": [Infinity]}', VALUES),
    ('{"history": [], "shown": [[9, 9, 9]], "click": [1], "order": [0]}', "ID [9, 9, 9] is not in"),
    ('{"history": [[9, 9, 9]], "shown": [[0, 0, 1]], "click": [1], "order": [0]}', "[9, 9, 9] is not in"),
    ('{"history": [], "shown": [null], "click": [1], "order": [0]}', "Semantic ID None"),
    ('{"history": null, "shown": [[0, 0, 1]], "click": [1], "order": [0]}', "got "),
    ("", "the row: got ''")])
def test_a_line_of_json_that_cannot_be_used_is_refused(folder, capsys, text, reason):
    path, _ = with_row({}, "jsonl")
    first, _, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, text, *others]))
    line = refused(capsys, run)
    assert line.startswith("nanoadagrpo: shop/log.jsonl, line 2: ")
    assert reason in line and "expected history like" in line


@pytest.mark.parametrize("cells, reason", [
    ('[],"[\'<a_9><b_9><c_9>\']",[1],[0]', "is not in index.json"), ("[],\"['<a_0><b_0><c_1>']\",[nan],[0]", "got "),
    ("[],\"['<a_0><b_0><c_1>']\",1,0", "got "), ("[],\"['<a_0><b_0><c_1>']\",[1]", "order: got ''"),
    ("[],\"['<a_0><b_0><c_1>' '<a_0><b_1><c_0>']\",[1],[0]", "is not in index.json"),
    ('[],"[\'<a_0><b_0><c_1>\'],[1],[0]', "end of data")])
def test_a_line_of_csv_that_cannot_be_used_is_refused(folder, capsys, cells, reason):
    path, _ = with_row({}, "csv")
    text = path.read_text().splitlines()
    path.write_text("\n".join([*text[:2], *text[3:], cells]))
    line = refused(capsys, run)
    assert line.startswith(f"nanoadagrpo: shop/log.csv, line {len(text)}: ") and reason in line


@pytest.mark.parametrize("names", ["shown_item_sid,clicks,order", "shown,click,order", "shown_item_sid,order,order",
                                   "shown_item_sid,click,click"])
def test_a_log_without_its_columns_or_with_one_of_them_twice_is_refused(folder, capsys, names):
    header, (path, _) = f"history_item_sid,{names}", with_row({}, "csv")
    path.write_text("\n".join([header, *path.read_text().splitlines()[1:]]))
    line = refused(capsys, run)
    assert line.startswith("nanoadagrpo: shop/log.csv, line 1: one column for each") and repr(header.split(",")) in line


@both
def test_other_columns_and_a_trains_own_order_are_passed_over(tmp_path, layout):
    """Of what nobody asks for: order_id in a log, the number of an order in train."""
    layout(tmp_path / "plain")
    layout(tmp_path / "shop")
    [path] = (tmp_path / "shop").glob("log.*")
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        lines = [line + ("," + word) for line, word in zip(lines, ["order_id", *"1" * 99], strict=False)]
        train = (tmp_path / "shop" / "train.csv").read_text().splitlines()
        (tmp_path / "shop" / "train.csv").write_text("\n".join(
            f"{line},{word}" for line, word in zip(train, ["Order", *"1" * 99], strict=False)))
    else:
        lines = [json.dumps(json.loads(line) | {"order_id": 1}) for line in lines]
    path.write_text("\n".join(lines))
    assert same_log(load(tmp_path / "shop").log, load(tmp_path / "plain").log)


@both
@pytest.mark.parametrize("name", ["rl", "log"])
def test_a_file_of_the_other_layout_is_not_passed_over_in_silence(folder, capsys, layout, name):
    layout(folder / "shop")
    (folder / "shop" / "log.csv").unlink(missing_ok=True)
    source, ending = ("index.json", "csv") if (folder / "shop" / "index.json").exists() else ("catalogue.json", "jsonl")
    others = [f"{name}.{other}" for other in {"csv", "tsv", "jsonl", "json", "csv.gz", "jsonl.gz"} - {ending}]
    others += [f"{name}.{ending}".upper(), f"{name}.{ending}".capitalize(), f"{name}.{ending.upper()}"]
    for other in others:
        (folder / "shop" / other).write_text("")
        line = refused(capsys, run)
        said = f"shop/{other}: {source} goes with {name}.{ending}; convert or rename this, or move it away"
        assert line == f"nanoadagrpo: {said}"
        (folder / "shop" / other).unlink()
    for other in (f"{name}.{ending}.bak", f"{name}.txt", f"old-{name}.{ending}", f"{name}s.{ending}"):
        (folder / "shop" / other).write_text("")  # nobody takes these for it
    run()


@both
def test_a_log_without_a_click_to_learn_from_is_refused(folder, capsys, layout):
    """That of the last row is for the judge."""
    layout(folder / "shop", [(history, shown, [0] * len(click), [0] * len(order)) for history, shown, click, order
                             in LOG[:-1]] + LOG[-1:])
    line = refused(capsys, lambda: run("--log-holdout", "0.1"))
    assert "no click in the first 9 rows" in line and "take the file away" in line


@both
def test_an_empty_log_is_refused_and_not_taken_for_none(folder, capsys, layout):
    layout(folder / "shop", [])
    if (folder / "shop" / "log.jsonl").exists():
        (folder / "shop" / "log.jsonl").write_text("")
    assert "holds no rows" in refused(capsys, run)


@both
def test_orders_in_later_rows_alone_are_refused_too(folder, capsys, layout):
    layout(folder / "shop", [row[:3] for row in LOG[:2]], FIELDS[:3])
    path = next((folder / "shop").glob("log.*"))
    if path.suffix == ".jsonl":
        path.write_text(path.read_text() + json.dumps(ROW) + "\n")
        assert "log.jsonl, line 3: order has to be there in all rows or in none" in refused(capsys, run)
    else:  # a table has the column or not: here the first row ends too soon
        text = path.read_text().replace("click", "click,order", 1) + "[],\"['<a_0><b_0><c_1>']\",[1],[0]\n"
        path.write_text(text)
        assert "log.csv, line 2: order: got ''" in refused(capsys, run)


def test_a_table_whose_rows_all_end_before_its_orders_is_no_log_without_orders(folder, capsys):
    LAYOUTS["MiniOneRec"](folder / "shop", [row[:3] for row in LOG], FIELDS[:3])
    path = folder / "shop" / "log.csv"
    path.write_text(path.read_text().replace("click", "click,order", 1))
    assert "log.csv, line 2: order: got ''" in refused(capsys, run)


@both
@pytest.mark.parametrize("name", ["train", "rl"])
def test_an_empty_history_is_allowed_in_the_log_alone(folder, capsys, layout, name):
    layout(folder / "shop")
    assert (load("shop").log.history == -1).all(1).sum() == 2
    if (folder / "shop" / "index.json").exists():
        write_csv(folder / "shop" / f"{name}.csv", [csv_row([0], 1), csv_row([], 2)])
        place = f"shop/{name}.csv, line 3"
    else:
        (folder / "shop" / f"{name}.jsonl").write_text(jsonl_row([0], 1) + jsonl_row([], 2))
        place = f"shop/{name}.jsonl, line 2"
    line = refused(capsys, run)
    assert place in line and "drop the row" in line


# -- what the ranker learns --------------------------------------------------------------------------------------------


def first_step(monkeypatch, data, log, batch, seed=0):
    """Loss and gradients of the ranker's first step."""
    with monkeypatch.context() as patch, contextlib.suppress(StopIteration):
        found = []

        def step(self, where, loss):
            found.extend([loss.item(), [p.grad.clone() for p in self.parameters]])
            raise StopIteration

        patch.setattr(nano.Optimizer, "step", step)
        nano.train_ranker(data.catalogue, log, settings(seed=seed), batch=batch)
    return found


@pytest.mark.parametrize("orders", [True, False], ids=["with orders", "without"])
@pytest.mark.parametrize("batch", [1, 4, 7])  # of rows of up to four items
def test_rows_of_different_lengths_count_shown_item_by_shown_item(tmp_path, monkeypatch, batch, orders):
    data = load(log_jsonl(jsonl(tmp_path / "shop"), LOG if orders else [row[:3] for row in LOG]))
    loss, gradients = first_step(monkeypatch, data, data.log, batch)
    torch.manual_seed(0)
    ranker = nano.Ranker(data.catalogue, heads=1 + orders)
    steps = 3 * len(LOG) // batch
    rows = nano.batches(len(LOG), batch, steps, nano.make_generator(0, "ranker"))[0].tolist()
    terms, count = [], 0
    for row in rows:
        past = torch.tensor([[data.catalogue.row[CODES[item]] for item in LOG[row][0]] or [-1]])
        for item, click, order in zip(*LOG[row][1:], strict=True):
            logit = ranker(past, torch.tensor([[data.catalogue.row[CODES[item]]]]))[0, 0]
            terms.append(F.binary_cross_entropy_with_logits(logit[0], torch.tensor(float(click))))
            count += 1
            if orders and click:
                terms.append(F.binary_cross_entropy_with_logits(logit[1], torch.tensor(float(order))))
    expected = sum(terms) / count
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for one, p in zip(gradients, ranker.parameters(), strict=True):
        torch.testing.assert_close(one, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-4, atol=1e-7)


def test_filling_teaches_nothing_and_the_log_without_orders_has_one_head(tmp_path):
    data = load(log_jsonl(jsonl(tmp_path / "shop")))
    wider = nano.ImpressionLog(*(F.pad(x, (0, 3), value=-1 if x.dtype == torch.long else False) for x in data.log))
    wider = wider._replace(history=F.pad(data.log.history, (2, 0), value=-1))
    one, other = (nano.train_ranker(data.catalogue, log, settings(), batch=4) for log in (data.log, wider))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    without = load(log_jsonl(jsonl(tmp_path / "other"), [row[:3] for row in LOG]))
    assert without.log.order is None
    ranker = nano.train_ranker(data.catalogue, without.log, settings(), batch=4)
    assert (one.heads, ranker.heads) == (2, 1)
    assert ranker.probabilities(without.log.history, without.log.item).keys() == {"click"}


# -- what it is judged on ----------------------------------------------------------------------------------------------


class Oracle:
    """Says of each row's items what a table says."""

    def __init__(self, click, order=None):
        self.heads = {"click": click} | ({} if order is None else {"order": order})

    def probabilities(self, history, item):
        rows = history[:, 0]
        return {head: p[rows] * (item >= 0) for head, p in self.heads.items()}


def slow_auc(p, yes):
    """The share of pairs that are in the right order; half a pair for a tie."""
    gap = p[yes].double()[:, None] - p[~yes].double()
    return ((gap > 0).double() + 0.5 * (gap == 0)).mean().item()


@pytest.mark.parametrize("n, values", [(5, 3), (40, 2), (40, 1000), (1500, 4)])
def test_auc_is_the_share_of_pairs_in_the_right_order_ties_counting_half(n, values):
    draw = torch.Generator().manual_seed(n + values)
    item = torch.where(torch.rand(n, 4, generator=draw) < 0.8, torch.randint(9, (n, 4), generator=draw), -1)
    click = (torch.rand(n, 4, generator=draw) < 0.4) & (item >= 0)
    order = (torch.rand(n, 4, generator=draw) < 0.5) & click
    p, q = torch.randint(1, values + 1, (2, n, 4), generator=draw) / (values + 1)
    log = nano.ImpressionLog(torch.arange(n)[:, None], item, click, order)
    found = nano.judge_ranker(Oracle(p, q), log)
    assert found == pytest.approx({"click_auc": slow_auc(p[item >= 0], click[item >= 0]),
                                   "order_auc": slow_auc(q[click], order[click])}, abs=1e-6)
    assert nano.judge_ranker(Oracle(p), log._replace(order=None)) == {"click_auc": found["click_auc"]}
    assert nano.judge_ranker(Oracle(1 - p), log._replace(order=None))["click_auc"] == pytest.approx(
        1 - found["click_auc"], abs=1e-6)


def test_where_all_or_nothing_was_clicked_there_is_no_auc():
    item = torch.tensor([[0, 1], [2, -1]])
    history, p = torch.arange(2)[:, None], torch.rand(2, 2)
    for click in (item < 0, item >= 0):
        log = nano.ImpressionLog(history, item, click, torch.zeros_like(click))
        assert nano.judge_ranker(Oracle(p, p), log) == {}
    one = torch.tensor([[True, False], [False, False]])
    assert nano.judge_ranker(Oracle(p, p), nano.ImpressionLog(history, item, one, one)).keys() == {"click_auc"}


@pytest.mark.parametrize("share, kept", [(0.0, 0), (0.1, 1), (0.09, 0), (0.3, 3), (0.39, 3), (0.9, 9)])
def test_the_last_rows_are_kept_out(tmp_path, share, kept):
    folder = log_jsonl(jsonl(tmp_path / "shop"))
    whole, data = load(folder), load(folder, log_holdout=share)
    assert same_log(data.log, nano.ImpressionLog(*(x[: 10 - kept] for x in whole.log)))
    assert (data.holdout is None) == (kept == 0)
    assert not kept or same_log(data.holdout, nano.ImpressionLog(*(x[10 - kept :] for x in whole.log)))


def test_a_share_that_is_a_whole_number_of_rows_is_that_many(tmp_path):
    path = log_jsonl(jsonl(tmp_path / "shop")) / "log.jsonl"
    path.write_text(path.read_text() * 5)
    assert len(load(path.parent, log_holdout=0.58).holdout.item) == 29  # .58 times 50 is less than 29 in binary


@pytest.fixture
def shop(folder, brief):
    return log_jsonl(jsonl(folder / "shop"))


def test_rows_that_are_kept_out_change_their_auc_and_nothing_else(shop, folder, capsys):
    """Poison: their clicks are turned round."""
    turned = [(past, items, [1 - x for x in click], [0] * len(click)) for past, items, click, _ in LOG[-4:]]
    results = [run("--log-holdout", "0.4", "--seed", "2", "--out", "one")]
    log_jsonl(shop, [*LOG[:-4], *turned])
    results.append(run("--log-holdout", "0.4", "--seed", "2", "--out", "two"))
    log_jsonl(shop, LOG[:-4])
    results.append(run("--log-holdout", "0", "--seed", "2", "--out", "three"))
    assert results[0] == results[1] == results[2]
    (first, *one), (second, *two), three = (logged(folder / name) for name in ("one", "two", "three"))
    assert one == two == three
    assert first.keys() == {"phase", "step", "click_auc", "order_auc"}  # of the turned rows nothing was ordered
    assert second.keys() == {"phase", "step", "click_auc"} and (second["phase"], second["step"]) == ("ranker", 0)
    assert first["click_auc"] == pytest.approx(1 - second["click_auc"]) != 0.5
    weights = [(folder / name / "ranker.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert weights[0] == weights[1] == weights[2]
    for text in (capsys.readouterr().out, (folder / "one" / "report.md").read_text()):
        assert f"ranker: learnt from 6 of 10 rows of log.jsonl; click_auc {first['click_auc']:.3f}" in text


def test_kept_rows_without_clicks_say_nothing(shop, folder):
    log_jsonl(shop, [*LOG[:5], ([0], [1, 2], [0, 0], [0, 0]), ([3], [4], [0], [0])])
    run("--log-holdout", "0.3", "--out", "here")
    assert not [row for row in logged(folder / "here") if row["phase"] == "ranker"]


# -- checkpoints -------------------------------------------------------------------------------------------------------

CHANGES = {
    "no log": lambda folder: (folder / "log.jsonl").unlink(),
    "a row less": lambda folder: log_jsonl(folder, LOG[:-1]),
    "another order of rows": lambda folder: log_jsonl(folder, LOG[::-1]),
    "a click": lambda folder: log_jsonl(folder, [(*LOG[0][:2], [1, 1, 0], LOG[0][3]), *LOG[1:]]),
    "an order": lambda folder: log_jsonl(folder, [(*LOG[0][:3], [0, 0, 0]), *LOG[1:]]),
    "no orders": lambda folder: log_jsonl(folder, [row[:3] for row in LOG]),
    "a kept row": lambda folder: log_jsonl(folder, [*LOG[:-1], ([7, 8], [1, 5, 2], [1, 1, 1], [0, 1, 0])]),
    "own prompts for the method": lambda folder: (folder / "rl.jsonl").write_text(jsonl_row(*TRAIN[0])),
}


def test_a_run_does_not_go_on_with_another_log(shop, folder, capsys, monkeypatch):
    def stop(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(nano, "save_file", lambda tensors, path, real=nano.save_file: (
            stop() if list(folder.glob("here/checkpoint-*.safetensors")) else real(tensors, path)))
        refused(capsys, lambda: run("--save-every", "2", "--out", "here"))

    def resume(*arguments):
        nano.main(["--resume", "here", *arguments])

    for change in CHANGES.values():
        change(shop)
        with pytest.raises(SystemExit):
            resume()
        assert "another set of data" in capsys.readouterr().err
        (shop / "rl.jsonl").unlink(missing_ok=True)
        log_jsonl(shop)
    with pytest.raises(SystemExit):
        resume("--log-holdout", "0.2")
    assert "leave out --log-holdout" in capsys.readouterr().err
    resume()
    assert logged(folder / "here")[0]["phase"] == "ranker"


# -- the whole path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["JSONL", "MiniOneRec"])
def test_the_toy_world_written_as_a_folder_gives_the_numbers_of_the_toy(
        small_shop, folder, brief, monkeypatch, layout):
    with monkeypatch.context() as patch:
        patch.setattr(nano, "subset", lambda prompts, *_: prompts)  # as recorded, not shuffled
        world = nano.toy_world(settings())
    (folder / "shop").mkdir()
    sids = list(world.catalogue.row)
    splits = {"train": world.sft, "rl": world.rl, "valid": world.valid, "test": world.test}
    rows = {name: [*zip(x.history.tolist(), x.target.tolist(), strict=True)] for name, x in splits.items()}
    log = [*zip(*(x.int().tolist() if x.dtype == torch.bool else x.tolist() for x in world.log), strict=True)]
    if layout == "JSONL":
        (folder / "shop" / "catalogue.json").write_text(json.dumps(sids))
        for name, split in rows.items():
            (folder / "shop" / f"{name}.jsonl").write_text("".join(
                json.dumps({"history": [sids[item] for item in past], "target": sids[target]}) + "\n"
                for past, target in split))
        log_jsonl(folder / "shop", log, codes=sids)
    else:
        assert SHOP.codes <= 10, "or words would be sorted otherwise than numbers"

        def spell(item):
            return "".join(f"<{a}_{code}>" for a, code in zip("abc", sids[item], strict=True))

        (folder / "shop" / "index.json").write_text(json.dumps(
            {f"item {item}": spell(item).replace("><", "> <").split() for item in range(len(sids))}))
        for name, split in rows.items():
            table = [[repr([*map(spell, past)]), spell(target)] for past, target in split]
            write_csv(folder / "shop" / f"{name}.csv", table, ["history_item_sid", "item_sid"])
        log_csv(folder / "shop", log, spell=spell)
    options = [*QUICK, "--device", DEVICE, "--eval-every", "1", "--method", "adagrpo"]
    results = [nano.main(["--toy", *options, "--out", "toy"]),
               nano.main(["--data", "shop", "--log-holdout", "0", *options, "--out", "data"])]
    assert results[0] == results[1]
    assert logged(folder / "toy") == logged(folder / "data")
    for name in "ranker.safetensors", "policy/model.safetensors":
        assert (folder / "toy" / name).read_bytes() == (folder / "data" / name).read_bytes()
