# SPDX-License-Identifier: MIT
"""AdaGRPO in TRL: a GRPOTrainer with the ground truth as the last row of each group. Tested with TRL 1.16.0.

Your dataset gets a column ``target_ids``, the tokens of the ground truth exactly as a rollout would hold them (with
the end-of-sequence token where rollouts end by one). num_generations is K+1: one rollout of each group gives way to
the ground truth. The reward function is called twice, for the group and for the negatives. See trl_run.py.

Not for agents: with rollout_func, tools or environments a completion is more than one generation, and the ground truth
would not stand where it should. Each batch is checked for it. For text alone: D's likelihoods see no images.

TRL shuffles rows after generation and deals groups out over micro-batches and processes. That is harmless: a row
carries its advantage with it, and the loss is a mean over rows.
"""

from collections import defaultdict

import torch
from accelerate.utils import gather, gather_object
from extra_row import advantage_rows, core, negative_rows, repeats_of_truth, same_prompt, shares, which_core
from trl import GRPOTrainer
from trl_checks import check_model, check_settings, target_ids, total_rewards


class AdaGRPOTrainer(GRPOTrainer):
    def __init__(self, *positional, args, negatives=1, gate=None, **keyword):
        """negatives: M, at most K+1. gate: settings of advantage_rows, such as {"lam": 0.5, "ties": "max"}."""
        check_settings(args, negatives)
        self.negatives, self.gate = negatives, gate or {}
        super().__init__(*positional, args=args, **keyword)
        check_model(self.model)  # now that TRL has turned off what it can
        self.accelerator.print(which_core())

    def _positions(self, n):
        """Where this process's n rows stand in the whole batch."""
        return range(self.accelerator.process_index * n, (self.accelerator.process_index + 1) * n)

    def _is_truth(self, position):
        return (position + 1) % self.num_generations == 0

    def _generate_single_turn(self, *args, **kwargs):
        ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        for row, position in enumerate(self._positions(len(ids))):
            if self.model.training and self._is_truth(position):
                ids[row] = self._targets[row]
                if logprobs is not None:  # vLLM's; without any, TRL takes the ratio to the sampler to be 1
                    logprobs[row] = [None] * len(ids[row])
        return ids, logprobs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if not self.model.training:  # groups of num_generations_eval rows, no truth among them
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for position, ids, truth in zip(self._positions(len(prompts)), completion_ids_list, self._targets, strict=True):
            if self._is_truth(position) and list(ids) != truth:
                raise ValueError("the last completion of a group is not its target_ids: rollout_func, tools and "
                                 "environments do not go with this recipe")  # fmt: skip
        score = super()._calculate_rewards
        each = score(inputs, prompts, completions, completion_ids_list)  # of all processes
        texts, ids = gather_object(completions), gather_object(completion_ids_list)
        K = self.num_generations - 1
        B = len(ids) // (K + 1)
        make = torch.Generator().manual_seed(self.args.seed + self.state.global_step)  # the same on every process
        copies = torch.tensor(same_prompt(gather_object(prompts)[:: K + 1], K))  # their rollouts come last
        rows = negative_rows(torch.rand(B, B * K, generator=make) + copies, k=K, m=self.negatives).tolist()
        # Every row scores one negative under its own prompt: groups may be split, so each process scores its own.
        mine = [rows[p // (K + 1)][p % (K + 1) % self.negatives] for p in self._positions(len(prompts))]
        logged = self._pending_extra_logs, self._pending_metrics  # what the reward logs is of the group alone
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        negatives = score(inputs, prompts, [texts[row] for row in mine], [ids[row] for row in mine])
        self._pending_extra_logs, self._pending_metrics = logged
        repeats = torch.tensor(repeats_of_truth(ids, K), device=each.device)
        pool = torch.cat([core.group(each, K + 1), core.group(negatives, K + 1)], dim=1)
        total = total_rewards(pool, self.reward_weights, self.reward_func_names)
        self._rewards = total[:, : K + 1], total[:, K + 1 :][:, : self.negatives], repeats
        return each

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        words = self.accelerator.unwrap_model(self.model).get_input_embeddings().num_embeddings
        self._targets = target_ids(inputs, self.eos_token_ids, self._tokenizer.pad_token_id, words)
        batch = super()._generate_and_score_completions(inputs)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attend = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length, chunk = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        with torch.no_grad():
            logp = self._get_per_token_logps_and_entropies(self.model, ids, attend, length, batch_size=chunk)[0]
        logp = gather(core.length_normalized(logp.float(), batch["completion_mask"].bool()))
        logp = core.group(logp, self.num_generations)  # (B, K+1)
        advantages, diagnostics = advantage_rows(logp, *self._rewards, **self.gate)
        here = self._positions(len(inputs))
        batch["advantages"] = core.ungroup(advantages)[here.start : here.stop]
        self._logs["advantages"].extend(core.ungroup(advantages).tolist())  # it holds one batch: TRL's own drop out
        nll = -logp[:, -1].mean().item()  # TRL's own loss is a constant now
        for name, value in {"adagrpo/nll": nll, **shares(diagnostics)}.items():
            self._metrics["train"][name].append(value)
        return batch
