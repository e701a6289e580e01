# SPDX-License-Identifier: MIT
"""What several files share: small shops, small models of many families, and the plain way to score a sequence."""

import functools
import itertools
import json
import os

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import nanoadagrpo as nano

# `TEST_DEVICE=cuda pytest tests/nano` runs what tests give to the command line on a GPU.
DEVICE = os.environ.get("TEST_DEVICE", "cpu")

SHOP = nano.World(codes=6, items=60, users=60, impressions=8)

# A run of the command line that takes a second, given a small shop.
QUICK = ["--sft-steps", "3", "--sft-batch-size", "16", "--rl-steps", "2", "--batch-size", "8", "--group-size", "6",
         "--rl-prompts", "40", "--eval-prompts", "20", "--beam-width", "12"]


def settings(**changes):
    return nano.Settings(**{"device": "cpu", **changes})


def run(*arguments, data="shop"):
    """The command line on a small shop in a folder."""
    return nano.main(["--data", str(data), "--device", DEVICE, *QUICK, "--batch-size", "4", *map(str, arguments)])


def make_brief(patch):
    """Runs without what takes most of so short a run and is tested in files of its own: the ranker's training."""
    patch.setattr(nano, "train_ranker", functools.partial(nano.train_ranker, least_steps=5))


def refused(capsys, call, code=2):
    """The one line in which a call of the command line ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call()
    err = capsys.readouterr().err.splitlines()
    assert end.value.code == code and len(err) == 1 and err[0].startswith("nanoadagrpo: "), err
    assert len(err[0]) <= 300 and err[0].isprintable()
    return err[0]


def logged(out):
    """What was logged, but for how long it took."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if key not in ("seconds", "memory")} for row in rows]


def made(out):
    """Everything that a run leaves, but for times."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*")
             if path.is_file() and path.name not in ("config.json", "report.md", "metrics.jsonl")}
    report = (out / "report.md").read_text().splitlines()
    return files, logged(out), [line for line in report if line.startswith("|") and "python" not in line]


def listen():
    """A log that keeps its rows in a list."""
    rows = []
    return rows, lambda **row: rows.append({k: v.detach().clone() if torch.is_tensor(v) else v for k, v in row.items()})


# -- small models of many families, with random weights ---------------------------------------------------------------

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=64)
FAMILIES = {
    "llama": lambda **kw: LlamaConfig(**SIZES, num_key_value_heads=1, **kw),
    "gpt2": lambda **kw: GPT2Config(n_embd=16, n_layer=2, n_head=2, **{"n_positions": 64, **kw}),
    "qwen2": lambda **kw: Qwen2Config(**SIZES, num_key_value_heads=1, **kw),
    "qwen3": lambda **kw: Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8, **kw),
    "mistral": lambda **kw: MistralConfig(**SIZES, num_key_value_heads=1, **{"sliding_window": None, **kw}),
    "gemma": lambda **kw: GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8, **kw),
    "gemma2": lambda **kw: Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, **{"sliding_window": 64, **kw}),
    "gemma3": lambda **kw: Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8, **{"sliding_window": 64, **kw}),
    "phi": lambda **kw: PhiConfig(**SIZES, **kw),  # its head has a bias
    "granite": lambda **kw: GraniteConfig(**SIZES, num_key_value_heads=1, embedding_multiplier=3.0, logits_scaling=0.5,
                                          residual_multiplier=0.7, attention_multiplier=0.2, **kw),
    "cohere": lambda **kw: CohereConfig(**SIZES, num_key_value_heads=1, logit_scale=2.0, **kw),
}


def make_policy(catalogue, family="gpt2", attention="sdpa", seed=0, spread=0.3, bos=False, dtype=torch.float32,
                **config):
    """A policy far from uniform. In float64 the smallest difference shows."""
    torch.manual_seed(seed)
    config = FAMILIES[family](vocab_size=catalogue.S + 1 + bos, initializer_range=spread, eos_token_id=None,
                              pad_token_id=None, bos_token_id=catalogue.S + 1 if bos else None, **config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    return nano.Policy(model, catalogue, settings())


def save_model(folder, family="llama", bos=True, spread=0.3, words=("<s>", "<unk>", "hammer", "nail", "saw"), size=8,
               **config):
    """A random model as the hub has them: weights, config and a tokenizer that knows nothing of Semantic IDs.

    `words` may be a dictionary with ids of any sort; without words there is no tokenizer.
    """
    torch.manual_seed(0)
    config = FAMILIES[family](vocab_size=size, initializer_range=spread, pad_token_id=None, eos_token_id=None,
                              bos_token_id=None, **config)  # three rows more than words, as real models have
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if words:
        known = words if isinstance(words, dict) else {word: i for i, word in enumerate(words)}
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(known, unk_token="<unk>")), unk_token="<unk>",
                                **({"bos_token": "<s>"} if bos else {})).save_pretrained(folder)
    return folder


def state(policy):
    return {name: value.detach().clone() for name, value in policy.model.state_dict().items()}


def distance(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


# -- the plain way: the whole sequence, one prompt at a time, no padding, mask, positions or cache ---------------------


def plain_prompt(policy, history):
    """Words of one history; padding is left out instead of masked."""
    start = [] if policy.start is None else [policy.start]
    items = [item for item in history.tolist() if item >= 0]
    return torch.tensor([*start, *policy.catalogue.tokens[items].flatten().tolist(), policy.query])


def plain_next(policy, history, prefixes):
    """(n, V) log-probabilities of what follows each of n prefixes (n, l) of Semantic IDs."""
    ids = torch.cat([plain_prompt(policy, history).expand(len(prefixes), -1), prefixes], 1)
    return policy.model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1)


def plain_logp(policy, history, tokens):
    """(n, L) log-probabilities of n Semantic IDs (n, L) after one history."""
    ids = torch.cat([plain_prompt(policy, history).expand(len(tokens), -1), tokens[:, :-1]], 1)
    logits = policy.model(input_ids=ids, use_cache=False).logits[:, -tokens.shape[1] :]
    return logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]


def beam_search(policy, history, width, allowed=lambda prefix: None):
    """The textbook's: extend every beam by every token (or every allowed one), sort, keep `width`."""
    kept = [((), 0.0)]
    for _ in range(policy.catalogue.L):
        prefixes = torch.tensor([tokens for tokens, _ in kept], dtype=torch.long).reshape(len(kept), -1)
        following = plain_next(policy, history, prefixes).tolist()
        longer = [((*tokens, token), total + row[token]) for (tokens, total), row in zip(kept, following, strict=True)
                  for token in allowed(tokens) or range(len(row))]
        kept = sorted(longer, key=lambda beam: -beam[1])[:width]
    return kept


def every_sequence(catalogue, special=0):
    """((S + special)^L, L) all that can be said, sense or nonsense."""
    return torch.tensor(list(itertools.product(range(catalogue.S + special), repeat=catalogue.L)))
