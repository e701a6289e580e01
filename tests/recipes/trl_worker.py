# SPDX-License-Identifier: MIT
"""One optimizer step of the TRL recipe; writes what went in and the gradient that came out. Run by test_trl.py."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "recipes"))
import trl_run
from trl_adagrpo import AdaGRPOTrainer


def flat(tensors):
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors]).numpy()


class Spy(AdaGRPOTrainer):
    """The recipe, with its batch noted before TRL shuffles it."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        names = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"
        self.noted = {name: batch[name].numpy().copy() for name in names}
        self.noted["negative_rewards"] = self._rewards[1].numpy().copy()
        return batch


class NoteGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = flat(parameter.grad for parameter in model.parameters())


def main(folder, *, dtype=torch.float32, cls=Spy, **settings):
    trainer = trl_run.trainer(folder, cls, dtype, max_steps=1, max_grad_norm=0.0, **settings)
    before = flat(trainer.model.parameters())
    note = NoteGradient()
    trainer.add_callback(note)
    trainer.train()
    rank = trainer.accelerator.process_index
    np.savez(f"{folder}/rank{rank}.npz", **trainer.noted, gradient=note.gradient, before=before)
    leave(trainer)


def leave(trainer):
    """End this process, together with the others and without taking down Gloo's threads.

    PyTorch 2.13 can wait for ever while it does that: the destructor joins them, and holds the GIL, which they need to
    let a tensor go (pytorch/pytorch#56297). Seen in 3 of 61 runs on two busy cores.
    """
    trainer.accelerator.wait_for_everyone()  # a process whose peer is gone may abort on its way out
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], per_device_train_batch_size=int(sys.argv[2]), gradient_accumulation_steps=int(sys.argv[3]))
