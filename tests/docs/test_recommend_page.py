# SPDX-License-Identifier: MIT
"""docs/recommend.md: its blocks, played one after the other, find the likeliest items, for one user and for a file."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from fences import blocks
from test_commands import SMALL, model, shop
from test_data_page import EXAMPLES, TINY, unpack

import nanoadagrpo as nano

PAGE = (Path(__file__).parents[2] / "docs" / "recommend.md").read_text(encoding="utf-8")
SOME, USERS, MANY = blocks(PAGE)
[WHERE] = re.findall(r"^policy, data = .*$", SOME, flags=re.M)

# Equal histories, an empty one, one longer than the run's, and one that has every item but two.
HISTORIES = [["0", "7"], ["3"], ["0", "7"], [], [str(i % 12) for i in range(25)], [str(i) for i in range(10)]]


def play(policy, data, code=SOME):
    """The names that the first block makes of a run and its data."""
    code, names = code.replace(WHERE, f"policy, data = {policy!r}, Path({data!r})"), {}
    exec(compile(code, "page", "exec"), names)
    return names


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The folder in which the page was followed, and the names that it made."""
    folder, threads = tmp_path_factory.mktemp("recommend"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shop(folder / "shop"), model(folder / "model", "<a_0>", bos_token="saw")
        nano.main(shlex.split("--data shop --model model --out runs/mine --sft-lr 1e-2") + SMALL)
        rows = [{"user": f"user {i}", "history": history} for i, history in enumerate(HISTORIES)]
        Path("users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = play("runs/mine/policy", "shop")
        exec(compile(MANY, "page", "exec"), names)
    torch.set_num_threads(threads)
    return folder, names


def written(folder, name="items.jsonl"):
    return list(map(json.loads, (folder / name).read_text().splitlines()))


@torch.no_grad()
def likelihoods(names, words):
    """{item: log-probability} after a prompt in words, in one plain pass over all items."""
    items = torch.tensor([names["tokenizer"].convert_tokens_to_ids(sid) for sid in names["sids"].values()])
    prompt = names["tokenizer"]([words], return_tensors="pt").input_ids.expand(len(items), -1)
    logp = names["model"](torch.cat([prompt, items], 1)).logits[:, -items.shape[1] - 1 : -1].log_softmax(-1)
    return dict(zip(names["sids"], logp.gather(-1, items[..., None]).sum((1, 2)).tolist(), strict=True))


def test_the_search_among_items_finds_the_likeliest_items(played):
    _, names = played
    [bought] = names["bought"]
    likely = likelihoods(names, bought)
    found = [names["name_of"].get(tuple(names["tokenizer"].convert_ids_to_tokens(x))) for x in names["valid"][:, -3:]]
    assert None not in found and len(set(found)) == 5
    assert max(likely, key=likely.get) in found, "beams may miss what begins unlikely, hardly the best"


def test_each_user_of_the_file_gets_the_likeliest_items_that_are_new_and_their_scores(played):
    folder, names = played
    rows = written(folder)
    assert [row["user"] for row in rows] == [f"user {i}" for i in range(len(HISTORIES))]
    for row, history in zip(rows, HISTORIES, strict=True):
        words = "".join(word for item in history[-10:] for word in names["sids"][item])
        likely = {name: x for name, x in likelihoods(names, words).items() if name not in history}
        best = sorted(likely, key=likely.get, reverse=True)[:10]  # 50 beams hold all 12 items: none can be missed
        assert row["items"] == best and row["scores"] == pytest.approx([likely[name] for name in best], abs=1e-4)
    assert [len(row["items"]) for row in rows] == [10, 10, 10, 10, 0, 2]
    assert rows[0] == {**rows[2], "user": "user 0"} != {**rows[1], "user": "user 0"}


def test_the_batch_changes_nothing_and_fewer_beams_give_fewer_items(played, monkeypatch):
    folder, names = played
    monkeypatch.chdir(folder)
    names["recommend"]("users.jsonl", "one.jsonl", batch=1)
    for one, row in zip(written(folder, "one.jsonl"), written(folder), strict=True):
        assert one["items"] == row["items"] and one["scores"] == pytest.approx(row["scores"], abs=1e-4)
    names["recommend"]("users.jsonl", "few.jsonl", n=2, beams=4)
    assert [len(row["items"]) for row in written(folder, "few.jsonl")][:4] == [2, 2, 2, 2]


def test_unknown_items_are_left_out_and_the_longest_known_history_is_taken(played, monkeypatch):
    folder, names = played
    monkeypatch.chdir(folder)
    history = ["7", "new", *(str(i) for i in range(8)), "unheard of", "3"]
    rows = [["new", "3"], ["3"], history, [item for item in history if item in names["sids"]], ["new"], []]
    Path("odd.jsonl").write_text("".join(json.dumps(dict(user=i, history=x)) + "\n" for i, x in enumerate(rows)))
    names["recommend"]("odd.jsonl", "odd-items.jsonl", skip_unknown=True)
    found = [row["items"] for row in written(folder, "odd-items.jsonl")]
    assert found[0] == found[1] and found[2] == found[3] and found[4] == found[5] and all(found)


@pytest.mark.parametrize("item, says", [
    ("new", "'new': is no item of shop/index.json"), ("", "'': is no item"), (12, "12: is no item"),
    (["<a_0>", "<b_0>"], "['<a_0>', '<b_0>']: has 2 tokens; the items of shop/index.json have 3"),
    (None, "None: is no item"), ([], "[]: has 0 tokens"),
    (["<a_0>", "<b_0>", "<c_9>"], "['<a_0>', '<b_0>', '<c_9>']: is no item"), (["<a_0>"] * 4, ": has 4 tokens"),
], ids=str)
def test_an_item_of_a_history_that_is_none_is_refused_by_name_and_line_before_anything_is_written(
        played, monkeypatch, item, says):
    folder, names = played
    monkeypatch.chdir(folder)
    rows = [{"user": 0, "history": ["3"]}, {"user": 1, "history": ["3", item, "7"]}]
    Path("bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as refused:
        names["recommend"]("bad.jsonl", "not-written.jsonl")
    assert str(refused.value).startswith("bad.jsonl, line 2: ") and says in str(refused.value)
    assert "\n" not in str(refused.value) and not Path("not-written.jsonl").exists()
    with pytest.raises(ValueError) as refused:
        names["words_of"](item)
    assert says in str(refused.value)
    if "tokens" in says:  # it is no new item
        with pytest.raises(ValueError):
            names["recommend"]("bad.jsonl", "not-written.jsonl", skip_unknown=True)
        assert not Path("not-written.jsonl").exists()


@pytest.mark.parametrize("history", ["12", {"3": 1}, None])
def test_a_history_that_is_no_list_is_refused(played, monkeypatch, history):
    """Of text each letter would be taken as an item."""
    folder, names = played
    monkeypatch.chdir(folder)
    Path("bad.jsonl").write_text(json.dumps({"user": 0, "history": history}) + "\n")
    with pytest.raises(ValueError, match=r"^bad.jsonl, line 1: .*: is no list of items$"):
        names["recommend"]("bad.jsonl", "not-written.jsonl", skip_unknown=True)


def test_an_item_is_given_by_its_name_or_by_its_tokens(played):
    _, names = played
    assert names["words_of"]("3") == names["words_of"](3) == names["words_of"](names["sids"]["3"]) == names["sids"]["3"]


@pytest.mark.parametrize("more, refused", [(["<a_0>", "<b_0>", "<c_9>"], "new, "), (["<a_0>", "<b_0>"], "new, "),
                                           (["<a_2>", "<b_1>", "<c_1>"], "")], ids=["token", "level", "known"])
def test_a_later_catalogue_is_read_if_the_policy_knows_all_its_tokens(played, tmp_path, monkeypatch, more, refused):
    """Of the known tokens, the item that the first twelve have already; it is named in place of its twin."""
    folder, names = played
    (tmp_path / "index.json").write_text(json.dumps(names["sids"] | {"new": more}))
    monkeypatch.chdir(folder)
    if refused:
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/index.json: the policy does not know item new, ")):
            play("runs/mine/policy", str(tmp_path))
    else:
        assert "new" in play("runs/mine/policy", str(tmp_path))["name_of"].values()


def test_items_that_share_a_semantic_id_with_one_of_the_history_are_not_recommended(played, monkeypatch):
    folder, names = played
    monkeypatch.chdir(folder)
    rows = [{"user": 0, "history": ["3"]}, {"user": "new", "history": []}]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("twins").mkdir()
    Path("twins/index.json").write_text(json.dumps(names["sids"] | {"twin of 3": names["sids"]["3"]}))
    with_twin = play("runs/mine/policy", "twins")
    exec(compile(MANY.replace('"users.jsonl", "items.jsonl"', '"own.jsonl", "own-items.jsonl", n=12'), "page", "exec"),
         with_twin)
    row, new = written(folder, "own-items.jsonl")
    assert len(row["items"]) == 11 and not {"3", "twin of 3"} & {*row["items"]}
    assert len(new["items"]) == 12 and "twin of 3" in new["items"] and "3" not in new["items"], "the last is named"


@pytest.mark.parametrize("like", [lambda i: [i % 2, i % 3, i % 5, i], lambda i: [f"<{i % 2}>", f"<{i}>"],
                                  lambda i: [i]], ids=["four", "twice", "one"])
@pytest.mark.parametrize("kind", [dict, list])
def test_a_catalogue_of_any_tokens_and_length_is_spelt_as_the_policy_spells_it(kind, like, tmp_path, monkeypatch):
    """The words that stand on two levels among them."""
    monkeypatch.chdir(tmp_path)
    sids = {str(i): like(i) for i in range(12)}
    history = [{"history": [sids["7"], sids["3"]], "target": sids[str(i)]} for i in range(8)]
    Path("shop").mkdir()
    Path("shop/catalogue.json").write_text(json.dumps(sids if kind is dict else [*sids.values()]))
    for name in ("train", "valid", "test"):
        Path(f"shop/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    nano.main(shlex.split("--data shop --out runs/mine") + SMALL)
    spell = "".join(f"<{chr(97 + level)}_{token}>" for level, token in enumerate(sids["7"]))
    names = play("runs/mine/policy", "shop", re.sub(r"(?m)^bought = .*$", f"bought = [{spell!r}]", SOME))
    assert "".join(names["words_of"](sids["7"])) == "".join(names["words_of"]("7")) == spell
    likely = likelihoods(names, spell)
    assert len(set(likely.values())) > 1 and names["L"] == len(like(0))
    found = [names["tokenizer"].convert_ids_to_tokens(x) for x in names["valid"][:, -names["L"]:]]
    found = [names["name_of"][tuple(x)] for x in found]
    assert len(set(found)) == 5 and (len(like(0)) > 1 or found == sorted(likely, key=likely.get, reverse=True)[:5])


def test_its_beams_and_scores_are_those_of_the_evaluation(played):
    """Of the script's own constrained search, with items of the history left in."""
    folder, names = played
    cfg = nano.Settings(data=str(folder / "shop"), device="cpu", constrained=True)
    data = nano.load_data(cfg.data, cfg)
    policy = nano.Policy(names["model"], data.catalogue, cfg, names["tokenizer"])
    history = torch.tensor([[data.catalogue.row[tuple(names["sids"][item])] for item in HISTORIES[0]]])
    with torch.no_grad():
        select = nano.constrained(nano.beam(50), data.catalogue, distinct=True)
        beams, logp = nano.tree_decode(policy, nano.prefill(policy, history), select)
    found = list(zip(data.catalogue.item(beams)[0].tolist(), logp[0].sum(-1).tolist(), strict=True))
    found = [(item, x) for item, x in found if item not in history[0].tolist()][:10]
    row = written(folder)[0]
    assert [data.catalogue.row[tuple(names["sids"][name])] for name in row["items"]] == [item for item, _ in found]
    assert row["scores"] == pytest.approx([x for _, x in found], abs=1e-4)


def test_a_catalogue_of_four_items_is_served_whole(tmp_path, monkeypatch):
    """That of the example of docs/data.md: fewer items than the page asks for."""
    monkeypatch.chdir(tmp_path)
    unpack(EXAMPLES[0], tmp_path / "shop")
    nano.main(["--data", "shop", "--out", "run", *TINY])
    names = play("run/policy", "shop", SOME.replace('["0", "7"]', '["0", [1, 1]]'))
    ends = names["valid"][:, -2:]
    assert {names["name_of"][tuple(names["tokenizer"].convert_ids_to_tokens(beam))] for beam in ends} == {*"0123"}
