# SPDX-License-Identifier: MIT
"""AdaGRPO on Semantic IDs in TRL, from a run of nanoadagrpo.py to its table. Tested with TRL 1.16.0.

    python nanoadagrpo.py --data DIR --rl-steps 0 --out RUN               # or with one --method
    python docs/recipes/trl_sids.py --data DIR --run RUN --out runs/trl   # AdaGRPO in TRL

Several processes: `accelerate launch --multi_gpu --num_processes 2` in place of `python`, on CPUs too.
"""

import argparse
import copy
import functools
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig
from trl_adagrpo import AdaGRPOTrainer

import nanoadagrpo as nano

FLAGS = ["data", "rl_steps", "batch_size", "micro_batch_size", "group_size", "negatives", "lam", "tau", "rho", "lr",
         "constrained"]


def parse(argv):
    """The two folders, the seed of the training, and the run's settings with the given flags put in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="folder that nanoadagrpo.py wrote")
    parser.add_argument("--out", required=True, help="new folder for the trained policy")
    parser.add_argument("--seed", type=int, help="of the training; data and evaluation keep that of the run")
    for name in FLAGS:
        default, about = getattr(nano.Settings, name), "as in nanoadagrpo.py; default: as in the run"
        kind = dict(action="store_true") if default is False else dict(type=type(default))
        parser.add_argument(nano.to_flag(name), default=argparse.SUPPRESS, help=about, **kind)
    given = vars(parser.parse_args(argv))
    run, out, seed = (given.pop(name) for name in ("run", "out", "seed"))
    with nano.in_one_line(f"--run {run}", "name a folder that nanoadagrpo.py wrote"):
        saved = {**vars(nano.Settings(**json.loads((run / "config.json").read_text())))}
    if saved["reward"] or saved["updates"] != 1:
        parser.error(f"{run}: --reward and --updates are not known here, where the run's own ranker trains")
    processes, batch_size = int(os.environ.get("WORLD_SIZE", 1)), given.get("batch_size", saved["batch_size"])
    if batch_size % processes:
        parser.error(f"--batch-size {batch_size}: {processes} processes cannot share it equally")
    saved["rl_steps"] = saved["rl_steps"] or nano.Settings.rl_steps  # the run may have had none
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    cfg = nano.Settings(**saved | given | dict(device=device, toy=saved["toy"] and "data" not in given))
    return run, out, (cfg.seed if seed is None else seed) % 2**32, cfg


def load_policy(folder, catalogue, cfg):
    tokenizer, words = AutoTokenizer.from_pretrained(folder), [*catalogue.words, nano.QUERY_TOKEN]
    if tokenizer.convert_ids_to_tokens(range(len(words))) != words:
        raise ValueError(f"{folder}: its words are not the Semantic IDs of the data; take the run's own data")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return nano.Policy(model, catalogue, cfg, tokenizer)


@torch.no_grad()
def check_padding(policy):
    """TRL counts positions from the padding on: harmless to rotary ones, but not to those of GPT-2."""
    ids = policy.catalogue.tokens[:1]
    padded, mask = F.pad(ids, (5, 0), value=policy.query), F.pad(torch.ones_like(ids), (5, 0))
    plain, shifted = policy.model(ids).logits, policy.model(padded, attention_mask=mask).logits[:, 5:]
    if (plain - shifted).abs().max() > 1e-3 * plain.std():
        raise ValueError("padding on the left changes what the model says; take one of rotary positions")


def dataset(prompts, catalogue):
    """Prompts as text, to which the tokenizer adds <start> and <next>; and what truth and reward need."""
    words = ["".join(catalogue.words[token] for token in sid) for sid in catalogue.tokens.tolist()]
    rows = zip(prompts.history.tolist(), catalogue.tokens[prompts.target].tolist(), strict=True)
    return Dataset.from_list([dict(prompt="".join(words[item] for item in history if item >= 0),
                                   history=history, target_ids=target) for history, target in rows])


def reward_function(ranker, catalogue, cfg):
    # In float64: TRL rounds to float32, and then equal items tie exactly, in whatever rows they stand.
    score = nano.make_reward(copy.deepcopy(ranker).double(), cfg)

    def ranker_reward(completion_ids, history, **_):
        tokens, history = (torch.tensor(x, device=cfg.device) for x in (completion_ids, history))
        return score(history, catalogue.item(tokens)[:, None])[:, 0].tolist()  # the floor for what is no item
    return ranker_reward


def follow_catalogue(model, catalogue, query):
    """Generate items only, not any words of the policy. Likelihoods stay free, as in the script."""
    def allowed(_, ids):
        begun = ids[(ids == query).nonzero()[-1, 0] + 1 :]  # tokens of the Semantic ID so far
        words, valid = catalogue.continuations(begun[None, None])
        return words[valid].tolist()
    model.generate = functools.partial(model.generate, prefix_allowed_tokens_fn=allowed)


def make_trainer(policy, ranker, data, cfg, out, seed, cls=AdaGRPOTrainer, **more):
    check_padding(policy)
    rows = cfg.group_size + 1  # of each prompt: the rollouts and the truth
    B = cfg.batch_size // int(os.environ.get("WORLD_SIZE", 1))  # prompts of this process
    at_once = math.gcd(B, cfg.micro_batch_size or B)  # TRL wants micro-batches of equal size
    args = GRPOConfig(
        out, seed=seed, max_steps=cfg.rl_steps, learning_rate=cfg.lr, weight_decay=0.01, loss_type="grpo",
        per_device_train_batch_size=at_once * rows, gradient_accumulation_steps=B // at_once,
        num_generations=rows, max_completion_length=policy.catalogue.L, save_strategy="no", report_to=[],
        generation_kwargs=dict(eos_token_id=None), disable_dropout=True, gradient_checkpointing=False,
        bf16=policy.bf16, use_cpu=cfg.device == "cpu", logging_steps=min(10, cfg.rl_steps) or 1)
    trainer = cls(
        model=policy.model, processing_class=policy.tokenizer, train_dataset=dataset(data.rl, data.catalogue),
        reward_funcs=reward_function(ranker, data.catalogue, cfg), args=args, negatives=cfg.negatives,
        gate=dict(lam=cfg.lam, **cfg.tau_rho_ties()), **more)
    trainer.eos_token_ids = [-1]  # no token ends a Semantic ID: all have L tokens
    if trainer.is_fsdp_enabled:  # or only shards would be saved
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    return trainer


def main(argv=None, **more):
    try:
        run, out, seed, cfg = parse(argv)
        if os.path.isfile(out) or os.path.exists(f"{out}/config.json") or [*run.glob("policy/*/tokenizer.json")]:
            raise nano.UserError(f"--out {out} has to be new, and --run {run} of one method, or of --rl-steps 0")
        data = nano.toy_world(cfg) if cfg.toy else nano.load_data(cfg.data, cfg)
    except (nano.UserError, OSError) as error:
        argparse.ArgumentParser("trl_sids.py").error(error)
    policy = load_policy(run / "policy", data.catalogue, cfg)
    ranker = nano.Ranker(data.catalogue, heads=1 if data.log.order is None else 2).to(cfg.device)
    ranker.load_state_dict(load_file(run / "ranker.safetensors"))
    if cfg.constrained:
        follow_catalogue(policy.model, data.catalogue, policy.query)
    configs, results = copy.deepcopy((policy.model.config, policy.model.generation_config)), {}
    trainer = make_trainer(policy, ranker, data, cfg, out, seed, **more)
    test = nano.subset(data.test, cfg.eval_prompts, cfg.seed, "test")
    results["before"] = nano.evaluate(policy, ranker, test, cfg)[0]  # each process its share
    if cfg.rl_steps:
        trainer.train()
    # TRL gave the model a padding token. Trained again from a file with one, its row would get no gradient.
    policy.model.config, policy.model.generation_config = configs
    trainer.save_model(out), trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # until the first process has written
    results["after"] = nano.evaluate(load_policy(out, data.catalogue, cfg), ranker, test, cfg)[0]
    if trainer.is_world_process_zero():
        logs = [log["adagrpo/admitted"] for log in trainer.state.log_history if "adagrpo/admitted" in log]
        results["after"]["admitted"] = sum(logs) / max(1, len(logs))
        print(f"\n{nano.table(results, nano.COLUMNS)}\n\npolicy: {out}")
    return results, trainer


if __name__ == "__main__":
    main()
