# SPDX-License-Identifier: MIT
"""Micro-batches and several processes are a matter of memory and time: the training is that of the whole batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import nanoadagrpo as nano

from .helpers import distance, listen, state
from .shops import jsonl
from .test_step import METHODS, PROMPTS, cfg, policy_of, train

every_method = pytest.mark.parametrize("name", METHODS)
EXACT = {"difficult", "easy", "reliable", "not_prominent", "not_suppressed", "admitted", "zero_spread",
         "duplicate_rollouts", "invalid_rollouts", "bad_scores"}


def same_rows(ours, theirs, tolerance):
    """Counts to the bit: nobody's gate and no negative was another. Sums but for their last digits."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key in EXACT or isinstance(one[key], str):
                assert one[key] == other[key], key
            else:
                assert float(one[key]) == pytest.approx(float(other[key]), abs=tolerance), key


# -- micro-batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@every_method
def test_micro_batches_change_neither_loss_nor_gate_nor_negatives(name, size):
    whole, rows = train(name, cfg(**SHARED))
    parts, part_rows = train(name, cfg(**SHARED, micro_batch_size=size))
    assert distance(whole, state(policy_of())) > 1e-3
    assert distance(whole, parts) < 1e-9
    same_rows(part_rows, rows, 1e-6)
    if name not in ("nll", "grpo", "grpo+nll"):
        assert {float(row["admitted"]) for row in rows} - {0.0, 1.0}, "some are admitted and some are not"


def sft(**changes):
    policy, (rows, log) = policy_of(), listen()
    nano.train_sft(policy, PROMPTS, cfg(sft_steps=3, sft_batch_size=8, sft_lr=1e-2, **changes), log)
    return state(policy), rows


def test_micro_batches_change_no_supervised_step():
    (whole, rows), (parts, part_rows) = sft(), sft(micro_batch_size=1)
    assert distance(whole, state(policy_of())) > 1e-3 and distance(whole, parts) < 1e-9
    same_rows(part_rows, rows, 1e-6)


def test_of_several_micro_batches_one_graph_is_held_at_a_time():
    """Saved tensors are what training memory is made of: their greatest number at once falls with the micro-batch."""

    def most_held(**changes):
        held, most = 0, 0

        class Held:
            def __init__(self, tensor):
                nonlocal held, most
                self.tensor, self.size = tensor, tensor.numel()
                held += self.size
                most = max(most, held)

            def __del__(self):
                nonlocal held
                held -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            train("grpo+nll", cfg(batch_size=8, **changes))
        return most

    weights = sum(p.numel() for p in policy_of().model.parameters())
    assert most_held(micro_batch_size=1) - weights < 0.3 * (most_held() - weights)


# -- several processes -------------------------------------------------------------------------------------------------

ROOT = os.path.dirname(nano.__file__)
# Every method in float64, each process with its share of the batch, two micro-batches each; the first writes it down.
WORKER = """
import json, sys
import torch.distributed as dist
from safetensors.torch import save_file
dist.init_process_group("gloo")
from tests.nano.test_processes import SHARED, sft
from tests.nano.test_step import METHODS, cfg, train
for name in ["sft", *METHODS]:
    made, rows = sft(micro_batch_size=2) if name == "sft" else train(name, cfg(**SHARED, micro_batch_size=2))
    if dist.get_rank() == 0:
        save_file({key: x.clone() for key, x in made.items()}, f"{name}.safetensors")
        open(f"{name}.json", "w").write(json.dumps([{k: float(v) if hasattr(v, "item") else v for k, v in row.items()}
                                                    for row in rows]))
    dist.barrier()
dist.destroy_process_group()
"""
SHARED = dict(batch_size=8, updates=2, epsilon=0.01, negatives=1, rho=0.8)


def torchrun(folder, processes, *command):
    """As a user starts it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, str(folder)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_with_half_the_batch_each_train_as_one_with_the_whole(folder):
    (folder / "worker.py").write_text(WORKER)
    done = torchrun(folder, 2, "worker.py")
    assert done.returncode == 0, done.stderr
    for name in ["sft", *METHODS]:
        alone, rows = sft() if name == "sft" else train(name, cfg(**SHARED))
        together = load_file(folder / f"{name}.safetensors")
        assert distance(alone, state(policy_of())) > 1e-3
        assert distance(alone, together) < 1e-9, name
        same_rows(json.loads((folder / f"{name}.json").read_text()), rows, 1e-6)


def test_torchrun_of_the_script_gives_the_run_of_one_process_written_once(folder):
    jsonl(folder / "shop")
    # Scores of each process's own rows, in several parts.
    (folder / "two_scores.py").write_text(
        "def reward(history, item):\n"
        "    return {'last': (item * 7 + history[:, -1:] * 3) % 10 / 10, 'item': item % 4 / 4}\n")
    options = ["--data", "shop", "--device", "cpu", "--sft-steps", "4", "--sft-batch-size", "8", "--rl-steps", "4",
               "--batch-size", "4", "--group-size", "8", "--eval-prompts", "8", "--beam-width", "6",
               "--tau", "0.5", "--rho", "0.6", "--save-every", "2", "--method", "adagrpo-d",
               "--reward", "two_scores:reward"]
    nano.main([*options, "--out", "one"])
    done = torchrun(folder, 2, nano.__file__, *options, "--out", "two")
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
                for out in ("one", "two"))
    assert [row.keys() for row in one] == [row.keys() for row in two] and "reward/last" in one[-3]
    for ours, theirs in zip(one, two, strict=True):
        assert {k: v for k, v in ours.items() if k in ("phase", "step", "method", *EXACT)} == {
            k: v for k, v in theirs.items() if k in ("phase", "step", "method", *EXACT)}
        if "nll" in ours:
            assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-3)
    assert sorted(path.name for path in (folder / "two").iterdir()) == sorted(
        path.name for path in (folder / "one").iterdir()), "one process writes, once"
    assert done.stdout.count("| adagrpo-d ") == 1


def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(nano.BadInput, match=r"--sft-batch-size 128: 3 processes cannot share it equally"):
        nano.parse(["--toy"])
    with pytest.raises(nano.BadInput, match=r"--batch-size 64: 3 processes"):
        nano.parse(["--toy", "--sft-batch-size", "9"])
