# SPDX-License-Identifier: MIT
import os

import pytest
import torch

import nanoadagrpo as nano

from .helpers import SHOP, make_brief, settings

os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shop():
    """A toy world of about fifty items, whole: every prompt of the RL week is there."""
    return nano.toy_world(settings(rl_prompts=0), SHOP)


@pytest.fixture(scope="session")
def ranker(shop):
    return nano.train_ranker(shop.catalogue, shop.log, settings(), epochs=1)


@pytest.fixture(scope="session")
def base(shop):
    """A policy that knows a little of the shop; whoever trains it further, trains a copy."""
    policy = nano.tiny_policy(shop.catalogue, settings(), width=16)
    nano.train_sft(policy, shop.sft, settings(sft_steps=80, sft_batch_size=32, sft_lr=1e-2), lambda **row: None)
    return policy


@pytest.fixture
def brief(monkeypatch):
    make_brief(monkeypatch)


@pytest.fixture
def small_shop(monkeypatch):
    """The command line with a small toy world behind it."""
    whole = nano.toy_world
    monkeypatch.setattr(nano, "toy_world", lambda cfg: whole(cfg, SHOP))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that relative paths are relative to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
