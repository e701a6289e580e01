# SPDX-License-Identifier: MIT
"""What several files share: small shops, small models of many families, and the plain way to score a sequence."""

import itertools

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import nanoadagrpo as nano

SHOP = nano.World(codes=6, items=60, users=60, impressions=8)

# A run of the command line that takes a second, given a small shop.
QUICK = ["--sft-steps", "3", "--sft-batch-size", "16", "--rl-steps", "2", "--batch-size", "8", "--group-size", "6",
         "--rl-prompts", "40", "--eval-prompts", "20", "--beam-width", "12"]


def settings(**changes):
    return nano.Settings(**{"device": "cpu", **changes})


def listen():
    """A log that keeps its rows in a list."""
    rows = []
    return rows, lambda **row: rows.append({k: v.detach().clone() if torch.is_tensor(v) else v for k, v in row.items()})


# -- small models, each with a vocabulary in which Semantic IDs are scattered ------------------------------------------

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
    "gemma3": lambda **kw: Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8, sliding_window=64, **kw),
    "phi": lambda **kw: PhiConfig(**SIZES, **kw),  # its head has a bias
}


class Exact(nano.Policy):
    """A policy whose log-probabilities stay in float64, so that the smallest difference shows."""

    def logp(self, words, hidden):
        return self.model.get_output_embeddings()(hidden)[..., self.vocabulary].log_softmax(-1)


def make_policy(catalogue, family="gpt2", attention="sdpa", seed=0, kind=nano.Policy, spread=0.3, **config):
    """A policy far from uniform, whose SID tokens lie in any order among others that must not matter."""
    torch.manual_seed(seed)
    size = catalogue.S + 6
    config = FAMILIES[family](vocab_size=size, initializer_range=spread, bos_token_id=None, eos_token_id=None,
                              pad_token_id=None, **config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.double() if kind is Exact else model
    policy = kind(model, catalogue, settings())
    ids = torch.randperm(size)
    policy.vocabulary, policy.ask = ids[: catalogue.S], ids[catalogue.S : catalogue.S + 1]
    return policy


def save_model(folder, family="llama", bos=True, spread=0.3, **config):
    """A random model as the hub has them: weights, config and a tokenizer that knows nothing of Semantic IDs."""
    known = {word: i for i, word in enumerate(["<s>", "<unk>", "hammer", "nail", "saw"])}
    torch.manual_seed(0)
    config = FAMILIES[family](vocab_size=8, initializer_range=spread, pad_token_id=None, eos_token_id=None,
                              bos_token_id=None, **config)  # three rows more than words, as real models have
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(known, unk_token="<unk>")), unk_token="<unk>",
                            **({"bos_token": "<s>"} if bos else {})).save_pretrained(folder)
    return folder


def state(policy):
    return {name: value.detach().clone() for name, value in policy.model.state_dict().items()}


def distance(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


# -- the plain way: the whole sequence, one prompt at a time, no padding, mask, positions or cache ---------------------


def plain_prompt(policy, history):
    """Token ids of one history; padding is left out instead of masked."""
    items = [item for item in history.tolist() if item >= 0]
    return torch.cat([policy.start, *(policy.vocabulary[policy.catalogue.tokens[item]] for item in items), policy.ask])


def plain_next(policy, history, prefixes):
    """(n, S) log-probabilities of what follows each of n prefixes (n, l) of Semantic IDs."""
    ids = plain_prompt(policy, history).expand(len(prefixes), -1)
    ids = torch.cat([ids, policy.vocabulary[prefixes]], 1)
    return policy.model(input_ids=ids, use_cache=False).logits[:, -1, policy.vocabulary].log_softmax(-1)


def plain_scores(policy, history, tokens):
    """(n, L) log-probabilities of n Semantic IDs (n, L) after one history."""
    levels = [plain_next(policy, history, tokens[:, :level]) for level in range(tokens.shape[1])]
    return torch.stack([logp.gather(1, tokens[:, [level]])[:, 0] for level, logp in enumerate(levels)], 1)


def every_sequence(catalogue):
    """(S^L, L) all that can be said, sense or nonsense."""
    return torch.tensor(list(itertools.product(range(catalogue.S), repeat=catalogue.L)))
