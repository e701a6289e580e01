# SPDX-License-Identifier: MIT
"""docs/metrics.md: what is counted where there are fewer beams than the cut-off, or no valid one."""

from pathlib import Path

import torch

import nanoadagrpo as nano

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
CATALOGUE = nano.Catalogue([(a, b, 0) for a in range(4) for b in range(3)])
PROMPTS = nano.Prompts(torch.tensor([[0], [5], [7]]), torch.tensor([3, 11, 1]), torch.arange(3))


def evaluate(**settings):
    cfg = nano.Settings(device="cpu", **settings)
    return nano.evaluate(nano.tiny_policy(CATALOGUE, cfg), nano.Ranker(CATALOGUE, heads=1), PROMPTS, cfg)


def test_with_fewer_items_than_the_cutoff_every_item_is_found():
    metrics, each = evaluate(constrained=True)
    assert "a catalogue of 12 items, HR@50 is 1" in PAGE and CATALOGUE.N == 12
    assert metrics["hr@50"] == 1 and metrics["hr@1"] < 1 and each["item"].shape == (3, 12)


def test_a_prompt_without_a_valid_beam_counts_with_no_reward():
    """The policy is made to say one word again and again."""
    cfg = nano.Settings(device="cpu", beam_width=1)
    policy, ranker = nano.tiny_policy(CATALOGUE, cfg), nano.Ranker(CATALOGUE, heads=1)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.zero_()
    metrics, each = nano.evaluate(policy, ranker, PROMPTS, cfg)
    assert (each["item"] == -1).all() and metrics["hallucination"] == 1
    assert metrics["click_reward@1"] == 0 == metrics["hr@1"]
    assert "a prompt without any valid beam counts with 0" in PAGE
    assert evaluate(constrained=True)[0]["click_reward@1"] > 0
