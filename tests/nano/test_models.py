# SPDX-License-Identifier: MIT
"""Models of Hugging Face: what works gives the numbers of plain passes and runs whole; what cannot work says why."""

import functools
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    Gemma3nTextConfig,
    GPTNeoConfig,
    Lfm2Config,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    T5Config,
)

import nanoadagrpo as nano

from . import helpers
from .helpers import (
    DEVICE,
    FAMILIES,
    QUICK,
    SHOP,
    SIZES,
    beam_search,
    distance,
    logged,
    make_brief,
    plain_logp,
    save_model,
    settings,
    state,
)
from .shops import CODES, jsonl, minionerec

pytestmark = pytest.mark.usefixtures("brief")
CATALOGUE = nano.Catalogue([(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 1, 0)])
HISTORIES = torch.tensor([[-1, -1, 3], [0, 5, 2], [-1, 4, 4], [1, 0, 3]])
PROMPTS = nano.Prompts(HISTORIES, torch.tensor([3, 0, 5, 1]), torch.arange(4))
TEXTS = ["".join(CATALOGUE.words[token] for item in history[history >= 0] for token in CATALOGUE.tokens[item])
         for history in HISTORIES]
WITHOUT_START = ("gpt2", "phi", "qwen2")  # in what follows


def load(folder, catalogue=CATALOGUE, **changes):
    return nano.pretrained_policy(catalogue, settings(
        model=str(folder), **{"max_history": 3, "beam_width": 12, "group_size": 6, **changes}))


def run(folder, *arguments):
    return helpers.run(*arguments, data=folder)


def gradients(policy, value):
    policy.model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def forced(policy, tokens):
    return nano.tree_decode(policy, nano.prefill(policy, HISTORIES), nano.teacher_forcing(tokens))[1]


def edit(folder, change):
    """Change the tensors of a saved model."""
    path = folder / "model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A policy of each family with rows far apart, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    policy = load(save_model(folder / "model", request.param, bos=request.param not in WITHOUT_START))
    for rows in nano.tables_of(policy.model):
        rows.data += 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    nano.save_policy(policy, folder / "policy")
    return policy, folder / "policy"


# -- what works --------------------------------------------------------------------------------------------------------


def test_a_tree_on_a_loaded_model_says_what_repeating_the_prompt_says_and_so_do_its_gradients(saved):
    policy, _ = saved
    words = policy.model.config.vocab_size
    tokens = torch.randint(words, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    tree = forced(policy, tokens)
    plain = torch.stack([plain_logp(policy, h, t) for h, t in zip(HISTORIES, tokens, strict=True)])
    assert plain.std() > 0.1, "a model that says the same of everything would prove nothing"
    torch.testing.assert_close(tree, plain, rtol=1e-5, atol=2e-5)
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    ours, theirs = gradients(policy, (tree * weight).sum()), gradients(policy, (plain * weight).sum())
    for name in theirs:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=5e-5 * max(scale, 1e-2), msg=name)


def test_saved_and_loaded_again_a_policy_is_the_same_to_the_bit(saved):
    policy, folder = saved
    again, plain = load(folder, seed=5), AutoModelForCausalLM.from_pretrained(folder)
    before = state(policy)
    assert before.keys() == state(again).keys() == plain.state_dict().keys()
    for name, x in before.items():
        assert torch.equal(x, again.model.state_dict()[name]) and torch.equal(x, plain.state_dict()[name]), name
    assert torch.equal(nano.prefill(policy, HISTORIES).next_logp, nano.prefill(again, HISTORIES).next_logp)
    assert again.start == policy.start and again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()


@torch.no_grad()
def test_generate_with_nothing_set_gives_the_scripts_beams_and_likelihoods(saved):
    # Histories of different lengths in one batch: the saved tokenizer pads on the left, and adds start and <next>.
    policy, folder = saved
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given, W = tokenizer(TEXTS, padding=True, return_tensors="pt"), 12
    out = model.generate(**given, num_beams=W, num_return_sequences=W, length_penalty=0.0,
                         return_dict_in_generate=True, output_scores=True)
    beams, logp = nano.tree_decode(policy, nano.prefill(policy, HISTORIES), nano.beam(W))
    T = given["input_ids"].shape[1]
    assert out.sequences.shape == (4 * W, T + 3)
    assert torch.equal(out.sequences[:, T:].view(4, W, 3), beams)
    torch.testing.assert_close(out.sequences_scores.view(4, W), logp.sum(-1), rtol=0, atol=1e-5)
    spelt = ["".join([*CATALOGUE.words, "<next>", "<start>"][token] for token in beam) for beam in beams[1].tolist()]
    assert tokenizer.batch_decode(out.sequences[W : 2 * W, T:]) == spelt


@torch.no_grad()
@pytest.mark.parametrize("width", [3, CATALOGUE.N])
def test_generate_with_a_list_of_allowed_tokens_finds_the_items_by_their_free_likelihoods(saved, width):
    policy, folder = saved
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    T, names = given["input_ids"].shape[1], CATALOGUE.tokens.tolist()

    def allowed(prefix):
        return sorted({name[len(prefix)] for name in names if name[: len(prefix)] == list(prefix)})

    out = model.generate(**given, num_beams=width, num_return_sequences=width, length_penalty=0.0,
                         prefix_allowed_tokens_fn=lambda _, ids: allowed(ids[T:].tolist()),
                         return_dict_in_generate=True, output_scores=True)
    found, likelihoods = out.sequences[:, T:].view(4, width, 3).tolist(), out.sequences_scores.view(4, width).tolist()
    for history, beams, score in zip(HISTORIES, found, likelihoods, strict=True):
        expected = beam_search(policy, history, width, allowed)
        assert beams == [list(tokens) for tokens, _ in expected]
        assert score == pytest.approx([total for _, total in expected], abs=1e-5)
        if width == CATALOGUE.N:  # nothing can fall off: all items, from likely to unlikely
            order = plain_logp(policy, history, CATALOGUE.tokens).sum(-1).argsort(descending=True)
            assert beams == CATALOGUE.tokens[order].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_promised_family_is_trained_and_evaluated(family, tmp_path, ranker):
    policy, rows = load(save_model(tmp_path / "model", family, bos=family not in WITHOUT_START)), []
    c = settings(sft_steps=6, sft_batch_size=4, sft_lr=1e-2, rl_steps=2, batch_size=4, group_size=6, beam_width=12)
    before = state(policy)
    nano.train_sft(policy, PROMPTS, c, lambda **row: rows.append(row))
    nano.train_rl(policy, lambda history, item: item * 0.1, PROMPTS, c, "grpo+nll", lambda **row: rows.append(row))
    assert rows[5]["nll"] < rows[0]["nll"] and all(row["gradient_norm"].isfinite() for row in rows)
    still = [name for name, x in state(policy).items() if torch.equal(x, before[name])]
    assert not [name for name in still if name in dict(policy.model.named_parameters())], "everything learns"
    assert 0 <= nano.evaluate(policy, ranker, PROMPTS, c)[0]["hallucination"] <= 1


def test_products_in_bfloat16_are_near_those_in_float32_and_weights_stay_float32(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3")
    tokens = torch.randint(CATALOGUE.S, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    full, half, auto = (load(folder, dtype=dtype) for dtype in ("float32", "bfloat16", "auto"))
    one, two, three = (forced(policy, tokens) for policy in (full, half, auto))
    assert 0 < (one - two).abs().max() < 0.3 and torch.equal(one, three), "a CPU computes in float32"
    assert two.dtype == torch.float32 and {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert two.isfinite().all()


# -- the vocabulary ----------------------------------------------------------------------------------------------------

KNOWN = ["<s>", "<unk>", "<c_1>", "hammer", "<a_0>", "<next>"]  # two words of Semantic IDs and the query among them


@pytest.mark.parametrize("family, tied", [("qwen2", False), ("llama", True), ("phi", False)])
def test_known_words_bring_their_rows_and_new_ones_start_apart_around_the_mean(family, tied, tmp_path):
    folder = save_model(tmp_path / "model", family, words=KNOWN, size=9, tie_word_embeddings=tied)
    edit(folder, lambda tensors: [x.normal_() for name, x in tensors.items() if name == "lm_head.bias"])
    before = load_file(folder / "model.safetensors").values()
    one, again, other = load(folder), load(folder), load(folder, seed=1)
    words = [*CATALOGUE.words, "<next>", "<start>"]
    known = [i for i, word in enumerate(words) if word in KNOWN or word == "<start>"]
    new, source = [i for i in range(9) if i not in known], [KNOWN.index(w) for w in ("<a_0>", "<c_1>", "<next>", "<s>")]
    assert len(known) == 4
    tables = [*zip(*(nano.tables_of(policy.model) for policy in (one, again, other)), strict=True)]
    assert len(tables) == {"qwen2": 2, "llama": 1, "phi": 3}[family]
    for table, same, different in tables:
        [origin] = [x for x in before if x.shape == table.shape and torch.equal(x[source], table[known])]
        assert torch.equal(table, same) and not torch.equal(table[new], different[new])
        text = origin[: len(AutoTokenizer.from_pretrained(folder))]  # rows without a word say nothing of words
        apart = (table[new] - text.mean(0)) / text.std(0)
        assert apart.abs().max() < 0.5
        if table.dim() > 1:
            assert 0.07 < apart.std() < 0.13 and apart.mean().abs() < 0.05
            assert torch.cdist(table[new], table[new]).add(torch.eye(len(new)) * 9).min() > 0.02


def test_a_table_with_more_rows_than_the_policy_has_words_is_cut(tmp_path):
    folder = save_model(tmp_path / "model", words=KNOWN, size=200)
    policy, before = load(folder), load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    made = policy.model.get_input_embeddings().weight
    assert len(made) == policy.model.config.vocab_size == CATALOGUE.S + 2
    assert torch.equal(made[[0, CATALOGUE.S, CATALOGUE.S + 1]], before[[4, 5, 0]])
    with pytest.raises(nano.UserError, match=TREE):
        load(save_model(tmp_path / "window", "mistral", words=KNOWN, size=200, sliding_window=8))


def test_the_check_sees_a_window_though_most_rows_of_the_table_are_equal(tmp_path):
    folder = save_model(tmp_path / "window", "mistral", words=KNOWN, size=200, sliding_window=8)
    tensors = load_file(folder / "model.safetensors")
    for table in (x for x in tensors.values() if len(x) == 200):
        table[10:] = table[10]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for seed in range(6):
        with pytest.raises(nano.UserError, match=TREE):
            load(folder, seed=seed)


def test_a_folder_without_a_tokenizer_is_taken_and_knows_no_words(tmp_path):
    policy = load(save_model(tmp_path / "model", words=()))
    assert policy.start is None and policy.model.config.vocab_size == CATALOGUE.S + 1
    [table] = [x for name, x in load_file(tmp_path / "model" / "model.safetensors").items() if "embed_tokens" in name]
    made = policy.model.get_input_embeddings().weight
    assert not any(torch.equal(row, old) for row in made for old in table)
    assert ((made - table.mean(0)) / table.std(0)).std() < 0.17


def test_a_config_that_asks_for_tuples_is_taken(tmp_path):
    plain = load(save_model(tmp_path / "model"))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": False}))
    policy = load(tmp_path / "model")
    assert distance(state(policy), state(plain)) == 0
    nano.save_policy(policy, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("return_dict", True)


def test_the_run_says_how_many_sid_tokens_a_model_knows(tmp_path, capsys):
    """Words that are spelt in another way would silently start anew."""
    load(save_model(tmp_path / "some", words={"<s>": 3, "<unk>": 0, "<a_0>": 6, "<a_1>": 5, "<A_2>": 4}))
    load(save_model(tmp_path / "none", words=()))
    assert capsys.readouterr().out.splitlines() == [  # <start> is no SID token
        f"--model {tmp_path / 'some'}: knows 2 of the {CATALOGUE.S} SID tokens",
        f"--model {tmp_path / 'none'}: knows 0 of the {CATALOGUE.S} SID tokens"]


def test_a_tokenizer_of_a_single_known_word_is_taken(tmp_path, recwarn):
    """One row has no spread."""
    policy = load(save_model(tmp_path / "model", bos=False, words={"<unk>": 0}))
    assert all(p.isfinite().all() for p in policy.model.parameters()) and not recwarn.list


def test_a_tokenizer_in_any_file_is_read_or_refused(tmp_path, capsys):
    """A folder without one knows no word; one whose tokenizer cannot be read is not taken for such a folder."""
    for name in ("tekken.json", "spiece.model", "tokenizer.model", "vocab.txt"):
        folder = save_model(tmp_path / name, words=())
        (folder / name).write_text("x")
        with pytest.raises(nano.UserError, match="--model"):
            load(folder)


def test_a_config_whose_part_for_text_is_none_is_one_line(tmp_path):
    folder = save_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": {"hidden_size": 16}}))
    with pytest.raises(nano.UserError, match=r"--model .*model_type.*; expected a decoder-only model"):
        load(folder)


def test_ids_beyond_the_table_and_gaps_between_them_do_no_harm(tmp_path):
    words = {"<s>": 3, "<unk>": 0, "<a_0>": 6, "<a_1>": 8, "<b_0>": 900}  # 8 rows: two words have none
    folder = save_model(tmp_path / "model", words=words)
    policy, table = load(folder), load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    made = policy.model.get_input_embeddings().weight
    assert torch.equal(made[0], table[6]) and torch.equal(made[CATALOGUE.S + 1], table[3])
    assert not any(torch.equal(row, old) for row in made[1 : CATALOGUE.S + 1] for old in table)
    beyond = load(save_model(tmp_path / "other", words={"<s>": 8, "<unk>": 0, "saw": 1}))
    assert beyond.start is None, "a start token without a row is none"


@pytest.mark.parametrize("says", [True, False])
def test_two_tables_stay_two_whatever_the_config_says_of_ties(tmp_path, says):
    folder = save_model(tmp_path / "model", words=KNOWN, size=9, tie_word_embeddings=False)
    before = load_file(folder / "model.safetensors")
    edit_config(folder, tie_word_embeddings=says)
    policy = load(folder)
    table, head = policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight
    assert torch.equal(table[0], before["model.embed_tokens.weight"][4])
    assert torch.equal(head[0], before["lm_head.weight"][4]) and not torch.equal(table[0], head[0])
    nano.save_policy(policy, tmp_path / "policy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(again.get_input_embeddings().weight, table)
    assert torch.equal(again.get_output_embeddings().weight, head)


def test_no_row_is_kept_from_learning_as_that_of_a_padding_token(tmp_path):
    folder = save_model(tmp_path / "model", tie_word_embeddings=False)
    edit_config(folder, pad_token_id=0, eos_token_id=1, bos_token_id=0)
    nano.save_policy(load(folder), tmp_path / "policy")
    everything = torch.arange(6).expand(2, 6)  # in a history; every word but the special ones
    for policy in load(folder), load(tmp_path / "policy"):
        logp = nano.prefill(policy, everything).next_logp
        for rows in nano.tables_of(policy.model):
            assert torch.autograd.grad(logp[0, 0, 0], rows, retain_graph=True)[0].abs().amax(1).min() > 0
        assert policy.model.config.pad_token_id is None and policy.model.config.eos_token_id is None


def test_weights_in_bfloat16_are_taken_to_float32(tmp_path):
    folder = save_model(tmp_path / "model", words=KNOWN)
    edit(folder, lambda tensors: tensors.update({name: x.bfloat16() for name, x in tensors.items()}))
    edit_config(folder, dtype="bfloat16")
    policy, [name] = load(folder), [name for name in load_file(folder / "model.safetensors") if "embed_tokens" in name]
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    expected = load_file(folder / "model.safetensors")[name][4].float()
    assert torch.equal(policy.model.get_input_embeddings().weight[0], expected)
    nano.save_policy(policy, tmp_path / "policy")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").dtype == torch.float32


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_policy_has_attention_that_takes_masks_whatever_the_folder_asks_for(tmp_path, name):
    folder = save_model(tmp_path / "model", words=KNOWN)
    edit_config(folder, **{name: "flex_attention"})
    assert load(folder).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_kind_of_attention_that_is_not_installed_is_refused_in_one_line(tmp_path, name):
    folder = save_model(tmp_path / "model", words=KNOWN)
    edit_config(folder, **{name: "flash_attention_2"})
    with pytest.raises(nano.UserError, match=r"FlashAttention2 .*; expected a decoder-only model"):
        load(folder)


def test_a_folder_with_an_adapter_is_refused_whether_peft_is_installed_or_not(tmp_path):
    """Without it transformers would leave the adapter out."""
    folder = save_model(tmp_path / "model", words=KNOWN)
    (tmp_path / "model" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for _ in ("beside a model", "alone, as peft saves it"):
        with pytest.raises(nano.UserError, match="holds an adapter; merge that"):
            load(folder)
        (tmp_path / "model" / "config.json").unlink(missing_ok=True)


def test_words_are_spelt_as_minionerec_spells_them_and_never_twice_alike(tmp_path):
    as_they_are = nano.load_data(minionerec(tmp_path / "csv"), settings()).catalogue.words
    numbers = nano.load_data(jsonl(tmp_path / "jsonl"), settings()).catalogue.words
    spelt = {f"<{x}_{code}>" for sid in CODES for x, code in zip("abc", sid, strict=True)}
    assert as_they_are == numbers == sorted(spelt)
    assert nano.Catalogue([("<x>", "<x>"), ("<x>", "<y>")]).words == ["<a_<x>>", "<b_<x>>", "<b_<y>>"]


@pytest.mark.parametrize("sids", [
    [(1, 2), (10, 2), (1, 20)], [("red wine", "é"), ("RED", "É")], [("<x>", "<x>"), ("<x>", "<y>")],
    [("<a_1>", "<b_1>"), ("<a_11>", "<b_1>")], [(f"[{i}]", "▁") for i in range(3)], [("", " "), ("a", "\\n")]])
def test_the_saved_tokenizer_numbers_words_as_the_policy_does_and_spells_them_back(sids, tmp_path):
    catalogue = nano.Catalogue(sids)
    policy = nano.tiny_policy(catalogue, settings(), width=8)
    nano.save_policy(policy, tmp_path)
    tokenizer, order = AutoTokenizer.from_pretrained(tmp_path), torch.randperm(catalogue.S).tolist()
    text = "".join(catalogue.words[token] for token in order)
    assert tokenizer(text)["input_ids"] == [*order, policy.query]
    assert tokenizer.decode(order) == text and tokenizer.convert_tokens_to_ids(catalogue.words) == [*range(catalogue.S)]
    assert tokenizer.convert_tokens_to_ids("<next>") == tokenizer.pad_token_id == policy.query == catalogue.S


def test_a_prompt_is_the_models_own_start_the_history_and_the_query(tmp_path):
    policy, seen = load(save_model(tmp_path / "model")), []
    policy.model.register_forward_pre_hook(lambda module, args, options: seen.append(options), with_kwargs=True)
    nano.prefill(policy, HISTORIES[:1])
    expected = torch.tensor([[policy.start, *CATALOGUE.tokens[3], policy.query]])
    assert torch.equal(seen[0]["input_ids"], expected)
    nano.save_policy(policy, tmp_path / "policy")
    for tokenizer in policy.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "policy"):
        assert tokenizer(TEXTS[0])["input_ids"] == expected[0].tolist()
        assert tokenizer.convert_ids_to_tokens(expected[0]) == ["<start>", "<a_1>", "<b_0>", "<c_1>", "<next>"]
    assert load(save_model(tmp_path / "other", bos=False)).start is None


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(where, what it found) of a run from a model to a report."""
    folder = tmp_path_factory.mktemp("finished")
    jsonl(folder / "shop"), save_model(folder / "model", "qwen3", words=KNOWN)
    with pytest.MonkeyPatch.context() as patch:
        make_brief(patch)
        return folder, run(folder / "shop", *OPTIONS, "--model", folder / "model", "--out", folder / "first")


OPTIONS = ["--max-history", "4", "--sft-lr", "1e-2"]
TOY = ["--toy", "--device", DEVICE, *QUICK]


def test_a_model_goes_from_a_folder_to_a_report(finished):
    folder, results = finished
    assert list(results) == ["base", "adagrpo"] and "| adagrpo" in (folder / "first" / "report.md").read_text()
    sft = [row["nll"] for row in logged(folder / "first") if row["phase"] == "sft"]
    assert sft[-1] < sft[0]


def test_a_finished_policy_is_a_model_that_evaluates_to_what_it_did_and_can_be_trained_on(finished):
    folder, results = finished
    policy = ["--model", folder / "first" / "policy", "--sft-steps", "0"]
    alone = run(folder / "shop", *OPTIONS, *policy, "--rl-steps", "0", "--out", folder / "evaluated")
    assert alone == {"base": {key: x for key, x in results["adagrpo"].items() if key != "admitted"}}
    weights = [load_file(folder / out / "policy" / "model.safetensors") for out in ("first", "evaluated")]
    assert weights[0].keys() == weights[1].keys() and distance(*weights) == 0
    on = run(folder / "shop", *OPTIONS, *policy, "--out", folder / "on", "--method", "nll,grpo+nll")
    assert on.pop("base") == alone["base"] and list(on) == ["nll", "grpo+nll"]
    for name in on:
        assert distance(weights[0], load_file(folder / "on" / "policy" / name / "model.safetensors")) > 0


FRESH = f"""
import sys, pytest, nanoadagrpo as nano
from tests.nano.helpers import make_brief
make_brief(pytest.MonkeyPatch())
whole = nano.toy_world
nano.main(sys.argv[1:])
nano.toy_world = lambda cfg: whole(cfg, nano.{SHOP})
nano.main({TOY} + ["--out", "toy fresh"])
"""


def test_the_same_seed_gives_the_same_numbers_in_a_fresh_process(finished, small_shop, monkeypatch):
    """With a model and data, and in a toy shop."""
    folder, _ = finished
    command = [sys.executable, "-c", FRESH, "--data", "shop", "--device", DEVICE, *QUICK, "--batch-size", "4", *OPTIONS,
               "--model", "model", "--out", "fresh"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(pathlib.Path(nano.__file__).parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)
    nano.main([*TOY, "--out", "toy first"])
    for first, fresh, files in (("first", "fresh", 1), ("toy first", "toy fresh", 2)):
        assert logged(folder / fresh) == logged(folder / first)
        for file in ["policy/model.safetensors", "ranker.safetensors"][:files]:
            assert (folder / fresh / file).read_bytes() == (folder / first / file).read_bytes()


def test_an_inherited_generation_config_has_no_influence(finished):
    folder, results = finished
    inherited = {"temperature": 0.1, "top_k": 1, "num_beams": 3, "min_length": 40, "suppress_tokens": [5, 6],
                 "max_length": 4}
    shutil.copytree(folder / "model", folder / "loud")
    (folder / "loud" / "generation_config.json").write_text(json.dumps(inherited))
    assert run(folder / "shop", *OPTIONS, "--model", folder / "loud", "--out", folder / "from loud") == results
    kept = json.loads((folder / "from loud" / "policy" / "generation_config.json").read_text())
    assert not set(inherited) & {key for key, value in kept.items() if value is not None}


def test_a_model_whose_config_asks_for_attentions_and_hidden_states_trains_and_is_saved_without(finished):
    folder, results = finished
    shutil.copytree(folder / "model", folder / "verbose")
    config = json.loads((folder / "verbose" / "config.json").read_text())
    asks = dict(output_attentions=True, output_hidden_states=True, output_router_logits=True)  # two could not be saved
    (folder / "verbose" / "config.json").write_text(json.dumps(config | asks))
    assert run(folder / "shop", *OPTIONS, "--model", folder / "verbose", "--out", folder / "from verbose") == results
    kept = json.loads((folder / "from verbose" / "policy" / "config.json").read_text())
    assert not any(kept.get(key) for key in asks)


def test_a_mixture_of_experts_that_was_trained_with_an_auxiliary_loss_is_taken(folder):
    made_of(MixtralConfig(**PLAIN, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, max_position_embeddings=64, num_local_experts=4,
                          output_router_logits=True))(folder / "model")
    run(jsonl(folder / "shop"), *OPTIONS, "--model", "model", "--out", "here")
    assert not json.loads((folder / "here" / "policy" / "config.json").read_text())["output_router_logits"]


def test_the_code_of_the_pages_recommends_what_the_policy_would_and_its_reward_is_taken(folder, monkeypatch):
    pages = [(pathlib.Path(nano.__file__).parent / "docs" / page).read_text() for page in ("models.md", "recommend.md")]
    blocks = re.findall(r"^```python\n(.*?)^```$", "".join(pages), flags=re.M | re.S)
    [recommend], [own] = ([block for block in blocks if word in block] for word in ("found =", "def reward"))
    history = [["<a_0>", "<b_0>", "<c_1>"], ["<a_1>", "<b_1>", "<c_1>"]]
    for old, new in (('"runs/tutorial/policy/adagrpo"', '"runs/mine/policy"'), ('["0", "7"]', str(history))):
        assert recommend.count(old) == 1
        recommend = recommend.replace(old, new)
    minionerec(folder / "shop")
    (folder / "mine.py").write_text(own)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("mine", None)
    for options in (["--model", save_model(folder / "model")], []):
        run("shop", *options, "--sft-steps", "40", "--sft-lr", "1e-2", "--reward", "mine:reward", "--floor", "-2",
            "--out", "runs/mine")
        names = {}
        exec(recommend, names)
        c = settings(data="shop")
        catalogue = nano.load_data("shop", c).catalogue
        policy = nano.Policy(names["model"], catalogue, c, names["tokenizer"])
        bought = [catalogue.row[tuple(sid)] for sid in history]
        beams, logp = nano.tree_decode(policy, nano.prefill(policy, torch.tensor([bought])), nano.beam(5))
        spelt = [[[*catalogue.words, "<next>", "<start>"][token] for token in beam] for beam in beams[0].tolist()]
        found = names["tokenizer"].batch_decode(names["beams"])
        assert found == ["".join(words) for words in spelt] and logp[0].sum(-1).std() > 0.05
        assert names["found"] == [names["name_of"].get(tuple(words)) for words in spelt] and any(names["found"])
        shutil.rmtree("runs/mine")
    sys.modules.pop("mine", None)


# -- what cannot work --------------------------------------------------------------------------------------------------

PLAIN = dict(vocab_size=8, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def made_of(config, weights=True, seed=0):
    def make(folder):
        save_model(folder, words=("<s>", "<unk>"))
        (folder / "model.safetensors").unlink()
        torch.manual_seed(seed)
        (AutoModelForCausalLM.from_config(config) if weights else config).save_pretrained(folder)

    return make


def with_tables_per_layer(folder):
    config = Gemma3nTextConfig(
        **SIZES, **PLAIN, num_key_value_heads=1, head_dim=8, vocab_size_per_layer_input=8, laurel_rank=4,
        hidden_size_per_layer_input=4, altup_num_inputs=2, num_kv_shared_layers=0, layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2)
    made_of(config)(folder)
    edit(folder, lambda tensors: [x.fill_(1.0) for name, x in tensors.items() if "correct_output_scale" in name])


def pickled(folder):
    save_model(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    weights = save_model(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def with_code(folder):
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit_config(save_model(folder), model_type="mine", auto_map=auto)
    (folder / "mine.py").write_text("import pathlib\npathlib.Path('broken-in').touch()\n")


def biases_without_a_place(folder):
    """Qwen2's weights, which its config calls a Llama's."""
    edit_config(save_model(folder, "qwen2"), model_type="llama", architectures=["LlamaForCausalLM"])


def spoilt(value):
    return lambda folder: edit(save_model(folder), lambda tensors: tensors["model.norm.weight"].fill_(value))


def with_a_tokenizer_of(text):
    return lambda folder: (save_model(folder) / "tokenizer.json").write_text(text)


TREE = "in a tree are off by"
REFUSED = {
    "mistral window": (lambda folder: save_model(folder, "mistral", sliding_window=8), ["mistral", TREE]),
    "gemma 2 window": (lambda folder: save_model(folder, "gemma2", sliding_window=8), ["gemma2", TREE]),
    "gemma 3 window": (lambda folder: save_model(folder, "gemma3", sliding_window=8), ["gemma3", TREE]),
    "gpt-neo window": (made_of(GPTNeoConfig(
        **PLAIN, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=4)), ["gpt_neo", TREE]),
    **{f"longrope beyond {words} words": (lambda folder, words=words: save_model(
        folder, rope_parameters=dict(
            rope_type="longrope", factor=4.0, rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[1.0, 3.0, 8.0, 20.0],
            original_max_position_embeddings=words)), ["llama", TREE]) for words in (8, 12, 20)},
    "mpt": (made_of(MptConfig(**PLAIN, d_model=16, n_layers=2, n_heads=2, max_seq_len=64)), ["mpt", TREE]),
    "bloom": (made_of(BloomConfig(**PLAIN, hidden_size=16, n_layer=2, n_head=2)), ["bloom"]),
    # transformers 5.0 stops before the comparison, at the second table, which has fewer rows than the grown first one
    "gemma 3n": (with_tables_per_layer, ["gemma3n", "index" if transformers.__version__.startswith("5.0.") else TREE]),
    "lfm2": (made_of(Lfm2Config(**PLAIN, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=1, intermediate_size=24, full_attn_idxs=[1])), ["lfm2"]),
    "mamba": (made_of(MambaConfig(**PLAIN, hidden_size=16, num_hidden_layers=1, state_size=4)), ["mamba"]),
    "t5": (made_of(T5Config(d_model=16, num_layers=1), weights=False), ["t5"]),
    "bert": (made_of(BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=16, max_position_embeddings=64, initializer_range=0.5)),
             ["bert", "sees later tokens"]),
    **{f"bert {size}, seed {seed}": (made_of(
        BertConfig(vocab_size=64, hidden_size=size, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=128), seed=seed), ["bert", "sees later tokens"])
       for size in (8, 32) for seed in (0, 5, 7)},  # new weights are so small that the tree alone would not show it
    "context": (lambda folder: save_model(folder, "gpt2", n_positions=12),
                ["gpt2", "context of 12 tokens", "--max-history"]),
    "nan": (spoilt(float("nan")), ["llama", "model.norm.weight"]),
    "infinity": (spoilt(float("inf")), ["llama", "model.norm.weight"]),
    "no config": (lambda folder: (save_model(folder) / "config.json").unlink(), ["config.json"]),
    **{f"a tokenizer of {text!r}": (with_a_tokenizer_of(text), ["llama", "its tokenizer cannot be loaded"])
       for text in ("{", "", "{}", "[]", "null", "5")},
    "pickle": (pickled, ["llama", "safetensors"]),
    "cut short": (cut_short, ["llama", "safetensors"]),
    "a layer is missing": (lambda folder: edit_config(save_model(folder), num_hidden_layers=3),
                           ["llama", "model.layers.2.", "is missing"]),
    "weights of another shape": (lambda folder: edit_config(save_model(folder), intermediate_size=7),
                                 ["llama", "model.layers.0.mlp.", "of another shape"]),
    "a layer too many": (lambda folder: edit_config(save_model(folder), num_hidden_layers=1),
                         ["llama", "model.layers.1.", "not of this model"]),
    "biases without a place": (biases_without_a_place, ["llama", "_proj.bias", "not of this model"]),
    "a table of another size": (lambda folder: edit_config(save_model(folder), vocab_size=99),
                                ["llama", "of another shape"]),
    "code": (with_code, ["code"]),
    "an empty folder": (lambda folder: folder.mkdir(), []),
}


@pytest.mark.parametrize("make, words", REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_work_is_refused_by_name_in_one_line(folder, capsys, make, words):
    make(folder / "model")
    with pytest.raises(SystemExit) as end:
        run(jsonl(folder / "shop"), "--model", "model", "--out", "here")
    printed = capsys.readouterr().err
    line = printed.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("nanoadagrpo: --model model")
    assert "REPORT" not in printed and "[transformers]" not in printed
    for word in words:
        assert word in line, line
    assert not pathlib.Path("here").exists() and not pathlib.Path("broken-in").exists()


def test_constants_that_old_versions_saved_beside_the_weights_are_passed_over(tmp_path):
    old = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4), "transformer.h.0.attn.bias": torch.ones(64, 64)}
    before = state(load(save_model(tmp_path / "new", "gpt2")))
    after = state(load(edit(save_model(tmp_path / "old", "gpt2"), lambda tensors: tensors.update(old))))
    assert distance(before, after) == 0
    neo = GPTNeoConfig(**PLAIN, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
                       max_position_embeddings=64, attention_types=[[["global"], 2]])
    bert = BertConfig(**PLAIN, **SIZES, is_decoder=True)
    for config, names in (neo, ["transformer.h.0.attn.attention.bias", "transformer.h.1.attn.attention.masked_bias"]), (
            bert, ["bert.pooler.dense.weight", "cls.seq_relationship.bias"]):
        made_of(config)(tmp_path / config.model_type)
        load(edit(tmp_path / config.model_type, lambda tensors, names=names: tensors.update(
            {name: torch.ones(2) for name in names})))


def test_no_library_speaks_before_the_one_line(folder, capsys):
    """Where there is no network, the hub's library would tell of each of its retries."""
    with pytest.raises(SystemExit):
        run(jsonl(folder / "shop"), "--model", "models/none/here", "--out", "here")
    assert huggingface_hub.logging.get_verbosity() == transformers.utils.logging.get_verbosity() == logging.ERROR


def test_the_check_before_training_sees_what_goes_wrong_with_padding_alone(tmp_path, monkeypatch):
    forward, folder = transformers.LlamaForCausalLM.forward, save_model(tmp_path / "model")

    @functools.wraps(forward)  # with its signature
    def counting_padding(self, *, input_ids, position_ids=None, **options):
        cache = options.get("cache", options.get("past_key_values"))
        if cache is not None and not cache.get_seq_length():  # a prefill
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        return forward(self, input_ids=input_ids, position_ids=position_ids, **options)

    load(folder)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", counting_padding)
    with pytest.raises(nano.UserError, match=TREE):
        load(folder)


def test_a_window_or_a_context_that_just_fits_is_taken(tmp_path):
    need = (3 + 1) * 3 + 1  # start, three items, the query, and an item but for its last token: 1 + 9 + 1 + 2
    load(save_model(tmp_path / "window", "mistral", sliding_window=need))
    load(save_model(tmp_path / "context", "gpt2", n_positions=need))
    with pytest.raises(nano.UserError, match=TREE):
        load(save_model(tmp_path / "narrow", "mistral", sliding_window=need - 1))
    with pytest.raises(nano.UserError, match="context of 12 tokens"):
        load(save_model(tmp_path / "short", "gpt2", n_positions=need - 1))
