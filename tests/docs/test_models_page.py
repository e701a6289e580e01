# SPDX-License-Identifier: MIT
"""Code of docs/models.md that tests/nano/test_models.py does not run: the rows put back into the large model."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from fences import blocks
from safetensors.torch import load_file
from test_commands import SMALL, model, shop
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanoadagrpo as nano

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
OWN, NUMBER, PUT_BACK = blocks(PAGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a policy was made of a model with a start token."""
    folder, threads = tmp_path_factory.mktemp("models"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shop(folder / "shop"), model(folder / "model", "<a_0>", bos_token="saw")
        torch.set_num_threads(1)
        nano.main(shlex.split("--data shop --model model --out runs/mine --sft-lr 1e-2") + SMALL)
    torch.set_num_threads(threads)
    return folder


def play(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(block, names := {})
    return names


@pytest.mark.parametrize("as_list", [False, True])
def test_item_numbers_are_those_that_a_reward_sees_also_where_items_share_a_semantic_id(tmp_path, as_list):
    sids = [["<a_1>", "<b_0>"], ["<a_0>", "<b_0>"], ["<a_1>", "<b_0>"], ["<a_0>", "<b_1>"], ["<a_0>", "<b_0>"]]
    (tmp_path / "index.json").write_text(json.dumps(sids if as_list else {f"x{i}": sid for i, sid in enumerate(sids)}))
    code = NUMBER.replace("DIR", str(tmp_path)).replace(".values()", "" if as_list else ".values()")
    exec(code, names := {})
    assert names["number"] == nano.Catalogue(nano.read_catalogue(tmp_path / "index.json")).row
    assert names["number"][("<a_0>", "<b_1>")] == 2


@torch.no_grad()
def test_with_its_rows_put_back_the_large_model_says_what_the_policy_says(folder, monkeypatch):
    names = play(PUT_BACK, folder, monkeypatch)
    large, tokenizer = AutoModelForCausalLM.from_pretrained("large"), AutoTokenizer.from_pretrained("large")
    policy, rows = names["policy"], torch.tensor(names["rows"])
    assert (tokenizer.convert_ids_to_tokens(rows) ==
            ["saw" if word == "<start>" else word for word in names["own"].convert_ids_to_tokens(range(len(rows)))])
    tokens = torch.randint(len(rows), (5, 12), generator=torch.Generator().manual_seed(0))
    ours, theirs = policy(tokens).logits.log_softmax(-1), large(rows[tokens]).logits[..., rows].log_softmax(-1)
    assert ours.std() > 0.01 and (ours - theirs).abs().max() < 1e-5
    before, after = (load_file(f"{name}/model.safetensors")["transformer.wte.weight"] for name in ("model", "large"))
    assert len(after) == len(before) + len(rows) - 2, "<a_0> and the start token have their rows already"
    text = [row for row in range(len(before)) if row not in names["rows"]]
    assert text and torch.equal(before[text], after[text])
