# SPDX-License-Identifier: MIT
"""Every family of causal language models that transformers knows, tiny and random, by the rules of `--model`:

    OMP_NUM_THREADS=1 python tests/benchmarks/families.py --write     # all, into docs/families.md
    OMP_NUM_THREADS=1 python tests/benchmarks/families.py llama bert  # some, on the screen

A family is right if it is accepted, trees say what plain passes say, plain `generate` finds the same beams, and two
fresh processes load the same numbers. The configuration is the family's own with small sizes.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
import nanoadagrpo as nano  # noqa: E402
from tests.nano.helpers import plain_logp  # noqa: E402

W, CATALOGUE = 12, nano.Catalogue([(a, b, (a * b + c) % 5) for a in range(5) for b in range(5) for c in range(2)])
HISTORIES = torch.tensor([[-1, -1, -1, 3], [0, 5, 2, 40], [-1, -1, 4, 4], [-1, 49, 0, 3]])
TEXTS = ["".join(CATALOGUE.words[token] for item in history[history >= 0] for token in CATALOGUE.tokens[item])
         for history in HISTORIES]

SIZES = {  # a field whose whole name matches -> its size; the first that does
    ".*vocab_size.*|.*group_vocab": 300, "max_pos.*|max_(target|source)_pos.*|n_positions|n_ctx|max_seq_len": 128,
    "(num|n)_(hidden_|encoder_|decoder_)?layers?|(en|de)coder_layers|num_blocks|depth": 2, "num_kv_shared_layers": 0,
    "first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1, "qk_head_dim|mamba_d_head|mamba_headdim": 16,
    ".*head_dim|d_head|dim_head|kv_channels|attention_head_size|rotary_dim": 8,
    ".*(num|n)_(key_value|kv)_heads|num_query_groups": 2, ".*heads?|.*num_key_heads|.*num_value_heads": 4,
    ".*(num|n)_(local_|routed_)?experts": 4, ".*experts_per_tok.*|moe_k|moe_topk": 2, ".*rank|d_rel": 8,
    ".*n_groups?|topk_group|num_expert_group|n_shared_experts|mm_tokens.*": 1,
    ".*hidden_size.*|d_model|n_embd|.*embed_dim|.*embedding_(size|dim)|emb_dim|.*proj_dim|lru_width": 32,
    ".*intermediate_size.*|.*ffn.*_size|.*ffn_dim|n_inner|d_inner|dff|dim_ff|feed_forward_size|mlp_dim": 48}
UNSAID = dict(head_dim=8, num_key_value_heads=2, num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1,
              indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=64, indexer_compress_ratio=4)
ZAMBA = dict(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"], attention_hidden_size=64)
MORE = {  # what else a family needs
    "cohere_compass_text": dict(rope_parameters={"full_attention": dict(rope_type="default", rope_theta=1e4)}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4)), "falcon_h1": dict(mamba_d_ssm=32),
    "dory": dict(num_hidden_layers=3, n_input_layers=1, n_recurrent_layers=1, n_output_layers=1,
                 layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "dots3_note_text": dict(swa_q_lora_rank=8, swa_kv_lora_rank=8),
    **{name: dict(layer_types=["conv", "full_attention"]) for name in ("lfm2", "lfm2_moe")},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]), "mamba2": dict(head_dim=16),
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 16]), "xmod": dict(default_language="en_XX"),
    "zamba": dict(ZAMBA, attention_head_dim=16), "zamba2": ZAMBA}
KINDS = "right", "wrong", "refused", "not made"
MARKS = "<!-- table: families.py writes from here -->", "<!-- table: to here -->"


def sizes(config):
    """The fields of a configuration that make it small."""
    old, new = config.to_dict(), {}
    depth = old.get("num_hidden_layers", 0)
    lists = [x for x in old.values() if isinstance(x, list) and len(x) == depth and isinstance(x[0], str | bool)]
    kinds = [*zip(*lists, strict=True)]
    layers = sorted({kinds.index(kind) for kind in kinds})  # one of each kind, and two at least
    layers += [depth - 1] * (len(layers) == 1)
    for name, x in old.items():
        size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
        if name.endswith("_config") and hasattr(getattr(config, name), "to_dict"):
            new[name] = sizes(getattr(config, name))
        elif isinstance(x, list) and layers and len(x) == depth:
            new[name] = [x[i] if size is None else size for i in layers]
        elif x is None and name in UNSAID:
            new[name] = UNSAID[name]
        elif isinstance(x, int) and not isinstance(x, bool):
            if size is not None:
                new[name] = len(layers) if name == "num_hidden_layers" and layers else min(size, x)
            elif x >= 299 and name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                new[name] = 1
    if new.get("num_key_value_heads") and old["num_key_value_heads"] == old.get("num_attention_heads"):
        new["num_key_value_heads"] = 4
    return new | {name: True for name in ("is_decoder", "causal") if name in old} | MORE.get(config.model_type, {})


def make(name, folder):
    """A random model of this family, as the hub has them."""
    kind = CONFIG_MAPPING[name]
    config = kind(**sizes(kind()))
    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n > 5e6:
        raise ValueError(f"{n:,} parameters are not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # biases and scales too are those of a trained model
        p.data += 0.1 * torch.randn(p.shape)
    model(input_ids=torch.arange(2, 20)[None], use_cache=False)
    model.save_pretrained(folder)
    if model.config.model_type != config.model_type:
        config.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "<a_1>": 2, "hammer": 3}, unk_token="<unk>"))
    special = dict(bos_token="<s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def load(folder):
    with contextlib.redirect_stdout(io.StringIO()):  # it says how many words the model knows
        return nano.pretrained_policy(CATALOGUE, nano.Settings(
            model=str(folder), device="cpu", max_history=4, beam_width=W, group_size=6))


@torch.no_grad()
def faults(policy, folder):
    """What is wrong with an accepted policy."""
    old, new = AutoModelForCausalLM.from_pretrained(folder / "model"), policy.model
    rows = [x.get_input_embeddings().weight[i] for x, i in ((old, [0, 2]), (new, [policy.start, 1]))]
    if not torch.equal(*rows):
        yield "known words have lost their rows"
    for rows in nano.tables_of(new):  # among rows nearly alike a fault could go unnoticed
        rows.data += 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(policy.query + 1, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    prompt = nano.prefill(policy, HISTORIES)
    plain = torch.stack([plain_logp(policy, h, t) for h, t in zip(HISTORIES, tokens, strict=True)])
    forced = nano.tree_decode(policy, prompt, nano.teacher_forcing(tokens))[1]
    for tree in forced, nano.sequence_logp(policy, prompt, tokens):
        if not (tree - plain).abs().max() < 1e-3 * plain.std():
            yield f"log-probabilities in a tree off by {(tree - plain).abs().max() / plain.std():.1g} of their spread"
    beams, logp = nano.tree_decode(policy, prompt, nano.beam(W))
    nano.save_policy(policy, folder / "policy")
    model, tokenizer = (x.from_pretrained(folder / "policy") for x in (AutoModelForCausalLM, AutoTokenizer))
    out = model.generate(**tokenizer(TEXTS, padding=True, return_tensors="pt"), num_beams=W, num_return_sequences=W,
                         length_penalty=0.0, return_dict_in_generate=True, output_scores=True)
    error = (out.sequences_scores.view(4, W) - logp.sum(-1)).abs().max()
    if error > 1e-3 * plain.std() or not torch.equal(out.sequences[:, -3:].view(4, W, 3), beams):
        yield f"beams of generate differ, scores by {error:.1g}"


def verdict(name, folder):
    """One of KINDS, and the reason if any."""
    stage = "not made"
    try:
        make(name, folder / "model")
        stage = "wrong"
        found = [*faults(load(folder / "model"), folder)]
        return ("wrong", "; ".join(found)) if found else ("right", "")
    except nano.UserError as error:
        text = re.sub(r".*?, an? [\w-]+: |; expected a decoder-only.*", "", str(error))
        return "refused", re.sub(r"off by \S+", "off by ...", text)
    except Exception as error:
        return stage, nano.first_line(error) or type(error).__name__


def numbers(folder, names):
    """A checksum of the weights and log-probabilities of each policy, as a fresh process finds them."""
    code = """import families, hashlib, sys
with families.torch.no_grad():
    for name in sys.argv[2:]:
        policy = families.load(sys.argv[1] + "/" + name + "/model")
        tensors = *policy.model.state_dict().values(), families.nano.prefill(policy, families.HISTORIES).next_logp
        print("numbers", name, hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest())"""
    done = subprocess.run([sys.executable, "-c", code, folder, *names], check=True, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    return sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("numbers "))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    given, groups = parser.parse_args(argv), {}
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names:
            result = verdict(name, Path(folder, name))
            groups.setdefault(result, []).append(name)
            print(name, *result, sep=" | ", flush=True)
        right = groups.get(("right", ""), [])
        pairs = zip(numbers(folder, right), numbers(folder, right[::-1]), strict=True)
        unlike = [one[0] for one, other in pairs if one != other]
    count = {kind: sum(len(names) for key, names in groups.items() if key[0] == kind) for kind in KINDS}
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = [f"{len(given.names)} families: {', '.join(f'{n} {kind}' for kind, n in count.items())}. Of those that are "
             f"right, two fresh processes, in opposite order, found other numbers for {', '.join(unlike) or 'none'}.",
             f"{time.strftime('%d %B %Y', time.gmtime())}, commit {git.stdout.strip()}, Python "
             f"{sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}, seed 0, "
             f"{sum(os.times()[:4]) / 60:.1f} minutes of one core.",
             "", "| verdict | reason | families |", "| --- | --- | --- |"]
    for (kind, why), names in sorted(groups.items(), key=lambda x: (KINDS.index(x[0][0]), -len(x[1]))):
        why = re.sub(r"[<>`*]", "", " ".join(why.split()).replace("|", "/"))
        lines.append(f"| {kind} ({len(names)}) | {why:.100} | {', '.join(names)} |")
    if given.write:
        page = ROOT / "docs" / "families.md"
        (before, _), (_, after) = (page.read_text().split(mark) for mark in MARKS)
        page.write_text("\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after]))
    print(*lines, sep="\n")
    return count


if __name__ == "__main__":
    main()
