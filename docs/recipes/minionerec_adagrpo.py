# SPDX-License-Identifier: MIT
"""AdaGRPO in MiniOneRec: a few lines changed in its minionerec_trainer.py (read at commit 0606902).

MiniOneRec is a script collection on an old TRL, not a package, so what is tested here is this file against the loss
formula of its compute_loss. The option add_gt already puts the ground truth last in each group. Changes, all in
ReReTrainer._prepare_inputs:

1. at the top of the file          from minionerec_adagrpo import adagrpo_advantages, is_truth
2. in the block `if self.add_gt:`  if is_truth(self, i, len(prompts)):
       (it was `if (i+1)%repeat == 0:`, repeat being len(prompts) // num_categories; that is wrong as soon as two
       prompts of a batch share their target, or a group is split over processes)
3. in the same block               self.processing_class(targets[i] + self.processing_class.eos_token, ...
                                       add_special_tokens=False)
       (rollouts end by that token and their likelihood is a mean over tokens, so the truth must end by it too; with
       add_special_tokens=True Llama's tokenizer would put a start token before it)
4. after `advantages = (rewards - mean_grouped_rewards) / ...`, before it is sliced
       columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in ("prompt", "completion")}
       advantages = adagrpo_advantages(self, prompts, completions, prompt_completion_ids, attention_mask,
                                       completion_mask, rewards, columns)

Run rl.py with add_gt=True, num_generations=K+1, beta=0, beam_search=False, dynamic_sampling=False, dapo=False and
gspo=False. Of its rewards only `sasrec` is a ranker: a model that can be wrong about the truth. `semantic`, `rule` and
`ctr_only` compare with the truth itself, which then has the highest reward by definition: R has nothing to judge and
c is D alone, or less (for the latter two pass ties="max"). ranking_only, ranking, ranking_ctr, hybrid and all depend on
the place in the group, so they cannot score a negative. normalize_ctr_reward stays off.
"""

import torch
from accelerate.utils import gather, gather_object
from extra_row import advantage_rows, core, negative_rows, repeats_of_truth, same_prompt, shares, which_core


def is_truth(trainer, i, n):
    """Is row i of this process's n rows the last of its group? Groups may be split over processes."""
    return (trainer.accelerator.process_index * n + i + 1) % trainer.num_generations == 0


def adagrpo_advantages(trainer, prompts, completions, ids, attend, counts, rewards, columns, *, negatives=1, **gate):
    """Advantages of all processes' rows, as MiniOneRec's own line gives them; it slices them afterwards.

    prompts, completions, columns, ids (N, P+L), attend (N, P+L), counts (N, L): of this process; rewards: of all.
    """
    if trainer.state.global_step == 0 and trainer.accelerator.process_index == 0:
        print(which_core())
    k = trainer.num_generations - 1
    with torch.no_grad():
        token_logp = trainer._get_per_token_logps(trainer.model, ids, attend, counts.shape[1])
    logp = core.group(gather(core.length_normalized(token_logp.float(), counts.bool())), k + 1)  # (B, K+1)

    B, everyone = logp.shape[0], gather_object(completions)
    negative_rewards = torch.full((B, negatives), torch.nan, device=rewards.device)
    if B > 1:  # a last batch of one prompt has no other prompts: nobody is admitted
        make = torch.Generator().manual_seed(trainer.args.seed + trainer.state.global_step)  # the same on every process
        copies = torch.tensor(same_prompt(gather_object(prompts)[:: k + 1], k))  # their rollouts come last
        drawn = negative_rows(torch.rand(B, B * k, generator=make) + copies, k=k, m=negatives).tolist()
        # Every row scores one negative under its own prompt, so that it does not matter where a group is split.
        first = trainer.accelerator.process_index * len(prompts)
        mine = [everyone[drawn[p // (k + 1)][p % (k + 1) % negatives]] for p in range(first, first + len(prompts))]
        scores = torch.zeros(len(prompts), device=rewards.device)
        for reward_func, weight in zip(trainer.reward_funcs, trainer.reward_weights, strict=True):
            scores += weight * torch.tensor(reward_func(prompts=prompts, completions=mine, **columns)).to(scores)
        negative_rewards = core.group(gather(scores), k + 1)[:, :negatives]

    repeats = torch.tensor(repeats_of_truth(everyone, k), device=rewards.device)
    advantages, diagnostics = advantage_rows(logp, core.group(rewards, k + 1), negative_rewards, repeats, **gate)
    for name, value in {"adagrpo/nll": -logp[:, -1].mean().item(), **shares(diagnostics)}.items():
        trainer._metrics[name].append(value)
    return core.ungroup(advantages)
