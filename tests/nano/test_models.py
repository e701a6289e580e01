# SPDX-License-Identifier: MIT
"""Models of Hugging Face: what works gives the numbers of plain passes and runs whole; what cannot work says why."""

import json
import pathlib
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, Lfm2Config, MambaConfig, T5Config

import nanoadagrpo as nano

from .helpers import QUICK, plain_scores, save_model, settings
from .shops import CODES, jsonl, minionerec

CATALOGUE = nano.Catalogue([(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 1, 0)])
HISTORIES = torch.tensor([[-1, -1, 3], [0, 5, 2], [-1, 4, 4], [1, 0, 3]])
PROMISED = ["llama", "qwen2", "qwen3", "gpt2", "mistral", "gemma", "gemma2", "gemma3"]
every_family = pytest.mark.parametrize("family", PROMISED)


def load(folder, **changes):
    return nano.pretrained_policy(str(folder), CATALOGUE, settings(model=str(folder), **{"max_history": 3, **changes}))


def run(folder, *arguments):
    return nano.main(["--data", str(folder), "--device", "cpu", *QUICK, "--batch-size", "4", *map(str, arguments)])


def gradients(policy, value):
    policy.model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


# -- what works --------------------------------------------------------------------------------------------------------


@every_family
def test_a_tree_on_a_loaded_model_says_what_repeating_the_prompt_says_and_so_do_its_gradients(family, tmp_path):
    policy = load(save_model(tmp_path / "model", family))
    for layer in (policy.model.get_input_embeddings(), policy.model.get_output_embeddings()):
        layer.weight.data += 0.3 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(CATALOGUE.S, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    tree = nano.grow(policy, policy.read(HISTORIES), nano.given(tokens))[1]
    plain = torch.stack([plain_scores(policy, h, t) for h, t in zip(HISTORIES, tokens, strict=True)])
    assert plain.std() > 0.1, "a model that says the same of everything would prove nothing"
    torch.testing.assert_close(tree, plain, rtol=1e-5, atol=2e-5)
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    ours, theirs = gradients(policy, (tree * weight).sum()), gradients(policy, (plain * weight).sum())
    for name in theirs:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=5e-5 * max(scale, 1e-2), msg=name)


@every_family
def test_every_promised_family_is_trained_end_to_end_and_loads_without_this_project(family, folder):
    shop = jsonl(folder / "shop")
    model = save_model(folder / "model", family, bos=family != "gpt2")
    results = run(shop, "--model", model, "--out", "here", "--max-history", "4", "--sft-lr", "1e-2")
    assert list(results) == ["base", "adagrpo"]
    sft = [row["nll"] for row in map(json.loads, (folder / "here" / "metrics.jsonl").read_text().splitlines())
           if row["phase"] == "sft"]
    assert sft[-1] < sft[0]
    made = AutoModelForCausalLM.from_pretrained(folder / "here" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "here" / "policy")
    ids = tokenizer("<a_0><b_1><c_0><next>", return_tensors="pt", add_special_tokens=False).input_ids
    assert ids.shape == (1, 4) and ids.unique().numel() == 4 and ids.min() >= 5
    assert made(ids).logits.isfinite().all()
    assert tokenizer("hammer nail").input_ids == AutoTokenizer.from_pretrained(model)("hammer nail").input_ids


def test_new_words_start_apart_around_the_mean_of_the_known_ones_and_follow_from_the_seed(tmp_path):
    folder = save_model(tmp_path / "model", "qwen2", tie_word_embeddings=False)
    before, n = load_file(folder / "model.safetensors"), len(AutoTokenizer.from_pretrained(folder))
    one, again, other = load(folder), load(folder), load(folder, seed=1)
    assert one.model.get_input_embeddings().weight is not one.model.get_output_embeddings().weight
    for layer, name in (("input", "model.embed_tokens.weight"), ("output", "lm_head.weight")):
        table, same, different = (getattr(p.model, f"get_{layer}_embeddings")().weight.data
                                  for p in (one, again, other))
        new = torch.cat([one.vocabulary, one.ask])
        assert torch.equal(table[:n], before[name][:n]), "what was known stays"
        assert torch.equal(table, same) and not torch.equal(table[new], different[new])
        apart = (table[new] - before[name][:n].mean(0)) / before[name][:n].std(0)
        assert 0.06 < apart.std() < 0.14 and apart.mean().abs() < 0.05
        assert torch.cdist(table[new], table[new]).add(torch.eye(len(new)) * 9).min() > 0.02
    assert set(new.tolist()) == set(range(n, n + 1 + CATALOGUE.S)), "spare rows first, then new ones, none in vain"


def test_a_model_that_knows_the_words_keeps_what_it_knows(tmp_path):
    first = load(save_model(tmp_path / "model"))
    first.save(tmp_path / "again")
    second = load(tmp_path / "again", seed=5)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    assert torch.equal(first.vocabulary, second.vocabulary)


def test_words_are_spelt_as_minionerec_spells_them_and_never_twice_alike(tmp_path):
    as_they_are = nano.load_data(minionerec(tmp_path / "csv"), settings()).catalogue.words
    numbers = nano.load_data(jsonl(tmp_path / "jsonl"), settings()).catalogue.words
    spelt = {f"<{x}_{code}>" for sid in CODES for x, code in zip("abc", sid, strict=True)}
    assert as_they_are == numbers == sorted(spelt)
    assert nano.Catalogue([("<x>", "<x>"), ("<x>", "<y>")]).words == ["<a_<x>>", "<b_<x>>", "<b_<y>>"]


def test_a_prompt_is_the_models_own_start_the_history_and_the_question(tmp_path):
    policy, seen = load(save_model(tmp_path / "model")), []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options), with_kwargs=True)
    policy.read(HISTORIES[:1])
    history = policy.vocabulary[CATALOGUE.tokens[3]].tolist()
    expected = torch.tensor([[0, *history, policy.ask.item()]])
    assert torch.equal(seen[0]["inputs_embeds"], policy.model.get_input_embeddings()(expected))
    assert policy.tokenizer.convert_ids_to_tokens(history) == ["<a_1>", "<b_0>", "<c_1>"]
    assert load(save_model(tmp_path / "other", bos=False)).start.tolist() == []


def test_an_inherited_generation_config_has_no_influence(folder):
    shop, results = jsonl(folder / "shop"), []
    for name, inherited in (("plain", None), ("loud", {"temperature": 0.1, "top_k": 1, "num_beams": 3, "min_length": 40,
                                                       "suppress_tokens": [5, 6], "max_length": 4})):
        model = save_model(folder / name)
        if inherited:
            (model / "generation_config.json").write_text(json.dumps(inherited))
        results.append(run(shop, "--model", model, "--out", f"from {name}"))
        kept = json.loads((folder / f"from {name}" / "policy" / "generation_config.json").read_text())
        assert not set(inherited or ()) & {key for key, value in kept.items() if value is not None}
    assert results[0] == results[1]


def test_products_in_bfloat16_are_near_those_in_float32_and_weights_stay_float32(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3")
    tokens = torch.randint(CATALOGUE.S, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    full, half, auto = (load(folder, dtype=dtype) for dtype in ("float32", "bfloat16", "auto"))
    one, two, three = (nano.grow(p, p.read(HISTORIES), nano.given(tokens))[1] for p in (full, half, auto))
    assert 0 < (one - two).abs().max() < 0.3 and torch.equal(one, three), "a CPU computes in float32"
    assert two.dtype == torch.float32 and {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert two.isfinite().all()


def test_the_code_of_the_page_recommends_what_the_policy_would_and_its_reward_is_taken(folder):
    page = (pathlib.Path(nano.__file__).parent / "docs" / "models.md").read_text()
    recommend, own = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    shop = minionerec(folder / "shop")
    (folder / "mine.py").write_text(own)
    sys.modules.pop("mine", None)
    for options in (["--model", save_model(folder / "model")], []):
        run(shop, *options, "--sft-steps", "20", "--sft-lr", "1e-2", "--reward", "mine:reward", "--floor", "-2",
            "--out", "runs/mine")
        names = {}
        exec(recommend, names)
        cfg = settings(data="shop")
        catalogue = nano.load_data("shop", cfg).catalogue
        policy = nano.Policy(names["model"], catalogue, cfg, names["tokenizer"])
        bought = [catalogue.row[tuple(sid)] for sid in (["<a_0>", "<b_0>", "<c_1>"], ["<a_1>", "<b_1>", "<c_1>"])]
        beams, logp = nano.grow(policy, policy.read(torch.tensor([bought])), nano.beam(5))
        spelt = [[catalogue.words[token] for token in beam] for beam in beams[0].tolist()]
        assert names["found"] == spelt and logp[0].sum(-1).std() > 0.05
        assert any(names["items"]) and {type(item) for items in names["items"] for item in items} == {str}
        shutil.rmtree("runs/mine")
    sys.modules.pop("mine", None)


# -- what cannot work --------------------------------------------------------------------------------------------------


def config_alone(config):
    return lambda folder: config.save_pretrained(folder)


def pickled(folder):
    save_model(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    weights = save_model(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def without(name):
    return lambda folder: (save_model(folder) / name).unlink()


def lacking_a_layer(folder):
    path = save_model(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))


def with_code(folder):
    path = save_model(folder) / "config.json"
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mine", "auto_map": auto}))
    (folder / "mine.py").write_text("import pathlib\npathlib.Path('broken-in').touch()\n")


def bidirectional(folder):
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                        max_position_embeddings=64, initializer_range=0.5)
    save_model(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def without_tokenizer(folder):
    save_model(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: save_model(folder, "mistral", sliding_window=8), ["mistral", "sliding window of 8 tokens"]),
        (lambda folder: save_model(folder, "gemma2", sliding_window=8), ["gemma2", "sliding window of 8 tokens"]),
        (config_alone(Lfm2Config(hidden_size=16, num_hidden_layers=2, full_attn_idxs=[1])), ["lfm2", "layers of conv"]),
        (config_alone(MambaConfig(hidden_size=16, num_hidden_layers=1)), ["mamba", "state-space"]),
        (config_alone(T5Config(d_model=16, num_layers=1)), ["t5", "encoder-decoder"]),
        (lambda folder: save_model(folder, "gpt2", n_positions=12), ["gpt2", "context of 12 tokens", "--max-history"]),
        (without("config.json"), ["cannot be loaded", "config.json"]),
        (pickled, ["cannot be loaded", "safetensors"]),
        (cut_short, ["cannot be loaded", "safetensors"]),
        (lacking_a_layer, ["it lacks model.layers.2"]),
        (without_tokenizer, ["cannot be loaded", "tokenizer"]),
        (with_code, ["cannot be loaded"]),
        (bidirectional, ["bert", "cannot grow a tree"]),
        (lambda folder: folder.mkdir(), ["cannot be loaded"]),
    ],
    ids=["mistral window", "gemma window", "lfm2", "mamba", "t5", "context", "no config", "pickle", "cut short",
         "layer missing", "no tokenizer", "code", "bert", "an empty folder"],
)
def test_a_model_that_cannot_work_is_refused_by_name_in_one_line(folder, capsys, make, words):
    make(folder / "model")
    with pytest.raises(SystemExit) as end:
        run(jsonl(folder / "shop"), "--model", "model", "--out", "here")
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("nanoadagrpo: --model model: ")
    for word in words:
        assert word in line
    assert not pathlib.Path("here").exists() and not pathlib.Path("broken-in").exists()


def test_a_window_or_a_context_that_just_fits_is_taken(tmp_path):
    need = (3 + 1) * 3 + 1  # start, three items, the question, and an item but for its last token: 1 + 9 + 1 + 2
    load(save_model(tmp_path / "window", "mistral", sliding_window=need))
    load(save_model(tmp_path / "context", "gpt2", n_positions=need))
    with pytest.raises(nano.BadInput, match="sliding window"):
        load(save_model(tmp_path / "narrow", "mistral", sliding_window=need - 1))
