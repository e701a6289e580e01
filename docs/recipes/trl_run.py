# SPDX-License-Identifier: MIT
"""A complete run of trl_adagrpo.py on a made-up task, with a tiny random model on the CPU. Needs: pip install trl

    python docs/recipes/trl_run.py
    torchrun --nproc_per_node 2 docs/recipes/trl_run.py
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig
from trl_adagrpo import AdaGRPOTrainer

USERS, LEVELS, CODES = 12, 3, 4
WORDS = [f"u{n}" for n in range(USERS)] + [f"{level}{code}" for level in "abc" for code in range(CODES)]


def truth(user):
    return [f"{level}{(user + step) % CODES}" for step, level in enumerate("abc")]


def reward(prompts, completions, **columns):
    """How many of the codes are right; every third user's ranker has it backwards. The sums break ties."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        user, words = int(prompt[1:]), completion.split()
        hits = sum(word == right for word, right in zip(words, truth(user), strict=False))
        scores.append((-1.0 if user % 3 == 0 else 1.0) * (hits + 0.001 * sum(map(WORDS.index, words))))
    return scores


def trainer(output_dir, cls=AdaGRPOTrainer, dtype=torch.float32, negatives=1, gate=None, **settings):
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<pad>", "</s>", *WORDS])}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **sizes)).to(dtype)
    rows = [
        {"prompt": f"u{n}", "target_ids": tokenizer.convert_tokens_to_ids([*truth(n), "</s>"])} for n in range(USERS)
    ]
    usual = {"per_device_train_batch_size": 18, "gradient_accumulation_steps": 1, "num_generations": 6,
             "max_completion_length": LEVELS + 1, "loss_type": "grpo", "learning_rate": 3e-3, "max_steps": 40,
             "logging_steps": 10, "use_cpu": True, "report_to": [], "save_strategy": "no", "bf16": False,
             "disable_dropout": True, "disable_tqdm": True}  # fmt: skip
    return cls(
        model=model,
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(output_dir, **{**usual, **settings}),
        negatives=negatives,
        gate=gate or {"rho": 0.5},  # five rollouts: by a tenth, a negative needs one of the last 3 of 7 places
    )


if __name__ == "__main__":
    run = trainer("runs/trl")
    run.train()
    print("NLL per token:", *[round(log["adagrpo/nll"], 2) for log in run.state.log_history if "adagrpo/nll" in log])
