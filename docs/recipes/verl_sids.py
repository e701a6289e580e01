# SPDX-License-Identifier: MIT
"""Semantic IDs in verl: an agent loop that samples items only, beside verl_adagrpo.py. Tested with verl 0.9.1.

Flags and environment are those of verl_adagrpo.py, but for VERL_USE_EXTERNAL_MODULES=verl_sids, and for

    actor_rollout_ref.rollout.agent.default_agent_loop=adagrpo_items actor_rollout_ref.rollout.name=vllm \
        actor_rollout_ref.rollout.calculate_log_probs=False actor_rollout_ref.rollout.enable_prefix_caching=True \
        actor_rollout_ref.model.path=RUN/policy data.filter_overlong_prompts=False

The prompts are token ids, in the dataset's column ``sid_prompt``; the truth is in ``target_ids``. To adapt: `items`.
"""

import functools
from uuid import uuid4

import verl_adagrpo  # noqa: F401, it registers the trainer
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register


def items():
    """The Semantic ID of every item, in token ids of the model."""
    raise NotImplementedError("verl_sids.items: put your catalogue here")


@functools.cache
def continuations():
    """{beginning of a Semantic ID: tokens that may follow it}."""
    after = {}
    for sid in items():
        for level, token in enumerate(sid):
            after.setdefault(tuple(sid[:level]), set()).add(token)
    return {beginning: sorted(tokens) for beginning, tokens in after.items()}


@register("adagrpo_items")
class ItemsAndTheTruth(AgentLoopBase):
    """Of the rollout.n sessions the last answers with the truth, the others sample an item, one request per level.

    verl computes old_log_probs anew by the free softmax, as nanoadagrpo.py does with --constrained.
    """

    async def run(self, sampling_params, **columns):
        prompt, target = ([int(token) for token in columns[name]] for name in ("sid_prompt", "target_ids"))
        session, response = uuid4().hex, []  # one session stays on one server, which has its prefix cached
        if columns["session_id"] == self.rollout_config.n - 1:
            response = target
        while len(response) < len(target):
            only = dict(max_tokens=1, ignore_eos=True, allowed_token_ids=continuations()[tuple(response)])
            output = await self.server_manager.generate(
                request_id=session, prompt_ids=prompt + response, sampling_params=sampling_params | only
            )
            response += output.token_ids
        mask = [1] * len(response)
        return AgentLoopOutput(prompt_ids=prompt, response_ids=response, response_mask=mask, metrics=AgentLoopMetrics())
