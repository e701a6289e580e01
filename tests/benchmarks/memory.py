# SPDX-License-Identifier: MIT
"""How many bytes of tensors the script holds at most, in a step and in a search, beside the formula of docs/scale.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/memory.py              # three sizes; ten minutes, no GPU
    python tests/benchmarks/memory.py --device cuda                  # what a GPU's allocator says, larger models

On a CPU the result of every operation is counted from when it is made until it is freed, as the allocator of a GPU
would count it, but for what a kernel needs within itself and for rounding up. The weights are random; bytes do not
depend on them.
"""

import argparse
import gc
import weakref

import torch
import work
from torch.utils._python_dispatch import TorchDispatchMode

import nanoadagrpo as nano


def shape(h, f, layers, heads, kv):
    return dict(hidden_size=h, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv)


SHAPES = work.SHAPES | {"tiny": shape(32, 96, 2, 4, 2), "4 M": shape(256, 768, 4, 4, 4),
                        "19 M": shape(512, 1536, 6, 8, 4), "107 M": work.SHAPES["smollm2"]}
STEPS = [  # model, B, micro-batch, K, T, prompts admitted, type of products
    ("4 M", 2, 2, 4, 20, 0, "float32"), ("4 M", 8, 8, 16, 61, 8, "float32"), ("4 M", 8, 8, 50, 200, 8, "float32"),
    ("4 M", 8, 8, 16, 61, 8, "bfloat16"), ("19 M", 8, 8, 16, 200, 0, "float32"), ("19 M", 8, 8, 16, 200, 8, "float32"),
    ("19 M", 8, 2, 16, 200, 8, "float32"), ("107 M", 4, 4, 16, 61, 4, "float32"), ("107 M", 4, 1, 16, 61, 4, "float32")]
SEARCHES = [  # model, prompts at once, beams, T
    ("4 M", 50, 10, 61), ("4 M", 50, 50, 200), ("19 M", 50, 50, 61), ("107 M", 20, 50, 61)]
GPU_STEPS = [("107 M", 64, 64, 16, 32, 64, "float32"), ("107 M", 64, 64, 16, 32, 64, "bfloat16"),
             ("0.6 B", 64, 64, 16, 32, 64, "bfloat16"), ("0.6 B", 64, 16, 16, 32, 64, "bfloat16"),
             ("1.7 B", 64, 64, 16, 32, 64, "bfloat16"), ("1.7 B", 64, 64, 16, 32, 6, "bfloat16")]
GPU_SEARCHES = [("107 M", 250, 50, 32), ("0.6 B", 250, 50, 32), ("1.7 B", 100, 50, 32)]


class Bytes(TorchDispatchMode):
    """Of all storages that are alive: now, and at most so far."""

    def __init__(self, module):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()
        for x in module.state_dict().values():
            self.count(x)

    def count(self, x):
        storage = x.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, lambda n: setattr(self, "now", self.now - n), storage.nbytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(x):
                self.count(x)
        return result


def a_policy(name, T):
    return work.a_policy("tiny", T, **SHAPES[name])


def sizes(config):
    """Hidden width, that of the feed-forward layers, layers, width of the keys of one layer."""
    return (config.hidden_size, config.intermediate_size, config.num_hidden_layers,
            config.num_key_value_heads * config.head_dim)


class Allocated:
    """The same of a GPU, from its allocator."""

    def __init__(self, module):
        torch.cuda.empty_cache()

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_):
        pass

    now = property(lambda self: torch.cuda.memory_allocated())
    peak = property(lambda self: torch.cuda.max_memory_allocated(),
                    lambda self, _: torch.cuda.reset_peak_memory_stats())


def step(name, B, micro, K, T, admitted, dtype):
    """(parameters, measured, by the formula) of a step that is not the first: Adam has its moments."""
    policy = a_policy(name, T)
    h, f, layers, _ = sizes(policy.model.config)
    policy.bf16 = dtype == "bfloat16"
    cfg = work.settings(B, K, micro_batch_size=micro)
    steps = work.steps(policy, work.some_prompts(policy, 2 * B, T), cfg, work.admitting(admitted))
    with (Bytes if work.DEVICE == "cpu" else Allocated)(policy.model) as counted:
        next(steps)
        counted.peak = counted.now
        next(steps)
    n, tokens = policy.model.num_parameters(), micro * (T + 2) + min(admitted, micro) * K * 2
    activations = tokens * layers * 4 * (14 * h + 4 * f) * (0.8 if policy.bf16 else 1)
    return n, counted.peak, (16 if micro == B else 20) * n + activations


@torch.no_grad()
def search(name, B, W, T):
    policy = a_policy(name, T)
    _, _, layers, keys = sizes(policy.model.config)
    with (Bytes if work.DEVICE == "cpu" else Allocated)(policy.model) as counted:
        prompt = nano.prefill(policy, work.some_prompts(policy, B, T).history)
        nano.tree_decode(policy, prompt, nano.beam(W))
    n = policy.model.num_parameters()
    return n, counted.peak, 4 * n + B * (2 * T + 2 * W) * layers * 16 * keys


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given, found = parser.parse_args(argv), []
    work.DEVICE, quick = given.device, given.quick
    tables = (STEPS, SEARCHES) if work.DEVICE == "cpu" else (GPU_STEPS, GPU_SEARCHES)
    for measure, cases in zip((step, search), tables, strict=True):
        for case in [("tiny", *cases[1][1:])] if quick else cases:
            gc.collect()  # the case before may still be in memory
            n, peak, formula = measure(*case)
            found.append(peak / formula)
            sizes = f"{n / 1e6:.1f} M | {peak / 2**20:.0f} | {formula / 2**20:.0f} | {found[-1]:.2f}"
            print(f"| {measure.__name__} | {' | '.join(map(str, case))} | {sizes} |", flush=True)
    return found


if __name__ == "__main__":
    main()
