# SPDX-License-Identifier: MIT
"""How fast is the script, against peers and the machine? Prints a table; --write puts it into docs/benchmarks.md.

    python tests/benchmarks/speed.py                        # every row; about half an hour on one core
    python tests/benchmarks/speed.py --rows step-16-60 beams-60
    python tests/benchmarks/speed.py --quick                # every check and the smallest sizes: is it in order?
    python tests/benchmarks/speed.py --device cuda          # the rows of a GPU, products in bfloat16 on both sides
    python tests/benchmarks/speed.py --words --before DIR   # over the vocabulary, beside a checkout of another commit
    python tests/benchmarks/speed.py --rows toy toy-all --before DIR    # whole runs in turn with that checkout's script

Each row first checks that both sides compute the same, then times them in turn in one process: CPU time of one thread,
which a busy machine disturbs less than the clock on the wall. What is printed is the median of the ratios of
neighbours, and their quartiles. On a GPU it is the time on the wall, from when the GPU is idle until it is idle again.
On a CPU without --rows, each row has a process of its own: what malloc keeps of one would speed up the next.
Rows with TRL need `pip install -e '.[nano,peers]'`.
"""

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import vocabulary  # noqa: E402
import work  # noqa: E402
from transformers import TrainerCallback, logging  # noqa: E402

BEFORE = ""  # a checkout of another commit
ROWS = {}  # name, with K and about T -> (what the table says, against whom, target, function)


def row(name, says, peer, target, **how):
    def enter(function):
        ROWS[name] = (says, peer, target, lambda quick, times: function(quick, times, **how))
        return function

    return enter


def clock():
    """CPU seconds of this process; on a GPU seconds on the wall, all its work being done."""
    if work.DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function):
    """Of one call."""
    gc.collect()
    began = clock()
    function()
    return clock() - began


def in_turn(ours, theirs, times):
    """[(our seconds, their seconds)], one after the other, after one call of each to warm up."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(times + 1)]
    return pairs[1:]


def quartiles(values):
    values = sorted(values)
    if len(values) < 2:
        return values * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def ratios(pairs, faster=True, **more):
    """What a row returns: quartiles of theirs/ours, or of ours/theirs if it is to be small; and the medians of both."""
    low, middle, high = quartiles([theirs / ours if faster else ours / theirs for ours, theirs in pairs])
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return dict(low=low, middle=middle, high=high, n=len(pairs), unit="x", ours=ours, theirs=theirs, **more)


# -- whole steps against TRL -------------------------------------------------------------------------------------------


class Turns(TrainerCallback):
    """Times TRL's steps in its own loop, and lets ours have a turn after each."""

    def __init__(self, ours, times):
        self.ours, self.times, self.pairs = ours, times, []

    def on_step_begin(self, args, state, control, **_):
        gc.collect()
        self.began = clock()

    def on_step_end(self, args, state, control, **_):
        theirs = clock() - self.began
        self.pairs.append([*(statistics.median(seconds(f) for _ in range(3)) for f in self.ours), theirs])
        control.should_training_stop = len(self.pairs) > self.times


def tenth_of(B):
    return work.admitting(max(1, round(0.1 * B)))


@functools.cache  # two rows of the table come from one run
def against_trl(shape, B, K, T, times, words=work.V, parts=1):
    """{method: [(its seconds, TRL's)]} of neighbouring steps, and how well the two agree.

    With more `words`, TRL has the model as it is, and the script the one that is cut; then there is another softmax.
    TRL runs its batch in so many `parts`, to have room for it.
    """
    policy = work.a_policy(shape, T)
    methods = ["grpo", tenth_of(B)] if parts > 1 else ["grpo", tenth_of(B), "nll", work.admitting(0)]
    prompts = work.some_prompts(policy, 4 * B, T)
    checked = work.trl_agrees(policy, prompts, K) if words == work.V and parts == 1 else None
    model = policy.model if words == work.V else work.a_policy(shape, T, words=words).model
    trainer = work.trl_trainer(policy, prompts, B, K, T, checked, model, parts)
    mine = [work.steps(work.copied(policy), prompts, work.settings(B, K), method) for method in methods]
    turns = Turns([lambda s=s: next(s) for s in mine], times)
    trainer.add_callback(turns)
    trainer.train()
    *ours, theirs = zip(*turns.pairs[1:], strict=True)
    pairs = {name: list(zip(mine, theirs, strict=True)) for name, mine in zip(methods, ours, strict=True)}
    return pairs, trainer.noted or {}


@row("gpu-step-0.6", "step, Qwen3-0.6B's sizes, K=16, T=61, B=8", "TRL", None, shape="0.6 B", K=16, T=61, B=8)
@row("gpu-step-64", "step, Qwen3-0.6B's sizes, K=16, T=61, B=64", "TRL, in 4 parts", None, shape="0.6 B", K=16, T=61,
     B=64, parts=4)
@row("gpu-step-135", "step, SmolLM2-135M's layers, K=16, T=61, B=16", "TRL", None, shape="smollm2", K=16, T=61, B=16)
@row("smollm2-all", "step, SmolLM2-135M's layers, 49,152 words that only TRL keeps, K=16, T=61, B=4", "TRL", 12,
     shape="smollm2", K=16, T=61, B=4, words=49152)
@row("smollm2", "step, SmolLM2-135M's layers, K=16, T=61, B=4", "TRL", 12, shape="smollm2", K=16, T=61, B=4)
@row("step-50-200", "step, K=50, T=200, B=2", "TRL", None, shape="tiny", K=50, T=200, B=2)
@row("step-50-60", "step, K=50, T=61, B=4", "TRL", 18, shape="tiny", K=50, T=61, B=4)
@row("step-16-60", "step (rollout, loss, backward, AdamW), K=16, T=61, B=8", "TRL", 11.5, shape="tiny", K=16, T=61, B=8)
def whole_step(quick, times, shape, K, T, B, words=work.V, parts=1):
    pairs, same = against_trl("smoke" if quick else shape, B, K, T, times, words, parts)
    return ratios(pairs["grpo"], same=same)


@row("gpu-tenth-0.6", "AdaGRPO step with NLL, 10 % admitted, Qwen3-0.6B's sizes, K=16, T=61, B=8", "TRL, plain GRPO",
     None, shape="0.6 B", K=16, T=61, B=8)
@row("gpu-tenth-64", "AdaGRPO step with NLL, 6 of 64 admitted, Qwen3-0.6B's sizes, K=16, T=61",
     "TRL, plain GRPO, in 4 parts", None, shape="0.6 B", K=16, T=61, B=64, parts=4)
@row("gpu-tenth-135", "AdaGRPO step with NLL, 2 of 16 admitted, SmolLM2-135M's layers, K=16, T=61",
     "TRL, plain GRPO", None, shape="smollm2", K=16, T=61, B=16)
@row("tenth-smollm2-all", "AdaGRPO step with NLL, 10 % admitted, SmolLM2-135M's layers, 49,152 words, K=16, T=61, B=4",
     "TRL, plain GRPO", 14, shape="smollm2", K=16, T=61, B=4, words=49152)
@row("tenth-50-200", "AdaGRPO step with NLL, 10 % admitted, K=50, T=200, B=2", "TRL, plain GRPO", 51, K=50, T=200, B=2)
@row("tenth-50-60", "AdaGRPO step with NLL, 10 % admitted, K=50, T=61, B=4", "TRL, plain GRPO", 29, K=50, T=61, B=4)
@row("tenth-16-60", "AdaGRPO step with NLL, 10 % admitted, K=16, T=61, B=8", "TRL, plain GRPO", 14.5, K=16, T=61, B=8)
def a_tenth(quick, times, K, T, B, shape="tiny", words=work.V, parts=1):
    """Steps in which nobody and in which one prompt is admitted, weighed so that a tenth of the prompts are.

    Of more than ten prompts a tenth is admitted, in whole prompts.
    """
    pairs, same = against_trl("smoke" if quick else shape, B, K, T, times, words, parts)
    mixed, note = pairs[tenth_of(B)], ""
    if B < 10:
        share = 0.1 * B  # of the steps that admit one
        mixed = [((1 - share) * none + share * one, theirs)
                 for (none, theirs), (one, _) in zip(pairs["admits 0"], mixed, strict=True)]
    if parts == 1:
        nll, grpo = (statistics.median(ours / other for (ours, _), (other, _) in zip(mixed, pairs[name], strict=True))
                     for name in ("nll", "grpo"))
        note = f"{nll:.2f} x NLL alone, {grpo:.2f} x plain GRPO (both ours)"
    return ratios(mixed, same=same, note=note)


# -- beam search against Hugging Face ----------------------------------------------------------------------------------


@row("constrained-200", "the same with --constrained, 3,000 items, T=200", "generate, prefix_allowed_tokens_fn", 40,
     T=200, B=2, constrained=True)
@row("constrained-60", "the same with --constrained, 3,000 items, T=61", "generate, prefix_allowed_tokens_fn", 23,
     T=61, B=4, constrained=True)
@row("gpu-beams-0.6", "beam search of width 50, Qwen3-0.6B's sizes, T=61, B=16", "Hugging Face generate", None,
     T=61, B=16, shape="0.6 B")
@row("beams-200", "beam search of width 50, T=200", "Hugging Face generate", 41, T=200, B=2)
@row("beams-60", "beam search of width 50, T=61", "Hugging Face generate", 18, T=61, B=4)
def beams(quick, times, T, B, shape="tiny", constrained=False, width=50):
    policy = work.a_policy("smoke" if quick else shape, T)
    history = work.some_prompts(policy, B, T).history
    allowed = work.allowed_tokens(policy.catalogue, T) if constrained else None
    policy.constraint = policy.catalogue if constrained else None
    same = work.check_beams(policy, history, width, allowed)
    pairs = in_turn(lambda: [work.our_beams(policy, history, width) for _ in range(5)],
                    lambda: work.their_beams(policy, history, width, allowed), times)
    return ratios([(ours / 5, theirs) for ours, theirs in pairs], same=same)


# -- memory ------------------------------------------------------------------------------------------------------------


@row("memory", "peak memory of a step, K=50, T=200, B=2, beyond model and optimizer", "TRL", 30)
def memory(quick, times):
    """Each side in a process of its own, which gives freed memory back at once."""
    sizes = [[], []]
    for _ in range(1 if quick else 2):
        for side, found in zip(("ours", "theirs"), sizes, strict=True):
            command = [sys.executable, __file__, "--memory-of", side, *(["--quick"] if quick else []), "--device",
                       work.DEVICE]
            freeing = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
            done = subprocess.run(command, env=freeing, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found.append(float(done.stdout.split()[-1]))
    result = ratios(list(zip(*sizes, strict=True)))
    note = f"{result['ours'] / 2**20:.0f} MiB against {result['theirs'] / 2**20:.0f} MiB"
    return result | dict(note=note, ours=None, theirs=None)


def resident(key):
    """Bytes of this process, now (VmRSS) or at most (VmHWM); on a GPU, of its tensors."""
    if work.DEVICE != "cpu":
        return (torch.cuda.memory_allocated if key == "VmRSS" else torch.cuda.max_memory_allocated)()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def memory_of(side, quick):
    """Bytes that the second step needs beyond what is held before it: model, optimizer, libraries."""
    K, T, B = 50, 200, 2
    policy = work.a_policy("smoke" if quick else "tiny", T)
    prompts = work.some_prompts(policy, 4 * B, T)

    def begin():
        gc.collect()
        if work.DEVICE == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
        else:
            torch.cuda.reset_peak_memory_stats()
        return resident("VmRSS")

    if side == "ours":
        mine = work.steps(policy, prompts, work.settings(B, K))
        next(mine)
        held = begin()
        next(mine)
    else:
        class Second(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                self.held = begin()

            def on_step_end(self, args, state, control, **_):
                self.peak = resident("VmHWM")
                control.should_training_stop = state.global_step == 2

        second, trainer = Second(), work.trl_trainer(policy, prompts, B, K, T)
        del policy
        trainer.add_callback(second)
        trainer.train()
        return second.peak - second.held
    return resident("VmHWM") - held


# -- against the machine, and against ourselves ------------------------------------------------------------------------


def matmul_rate():
    """Multiplications and additions per second, in the best of a few products of large matrices."""
    n, repeat = (1024, 4) if work.DEVICE == "cpu" else (8192, 20)
    a, b = torch.randn(2, n, n, device=work.DEVICE, dtype=torch.bfloat16 if work.BF16 else torch.float32)
    out = torch.mm(a, b)
    return max(repeat * 2 * n**3 / seconds(lambda: [torch.mm(a, b, out=out) for _ in range(repeat)]) for _ in range(3))


def flops(function):
    """Operations of the products that PyTorch runs, attention's among them."""
    from torch.utils.flop_counter import FlopCounterMode

    def in_place(total, one, other, **_):  # shapes; by addmm_ gradients are added up, and the counter does not know it
        return 2 * one[0] * one[1] * other[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        function()
    return counter.get_total_flops()


@row("gpu-mfu-all", "share of the measured peak in products, Qwen3-0.6B's sizes, K=16, T=61, B=64, everyone admitted",
     "measured product", None, shape="0.6 B", B=64, method="grpo+nll")
@row("gpu-mfu-none", "the same, nobody admitted", "measured product", None,
     shape="0.6 B", B=64, method="admits 0")
@row("gpu-mfu-256", "the same, B=256, everyone admitted", "measured product", None,
     shape="0.6 B", B=256, method="grpo+nll")
@row("gpu-mfu-1.7", "the same, Qwen3-1.7B's sizes, B=64, everyone admitted", "measured product", None,
     shape="1.7 B", B=64, method="grpo+nll")
@row("peak", "share of the measured peak in products, SmolLM2-135M's layers, K=16, T=61, B=4", "measured product", 0.60)
def share_of_peak(quick, times, shape="smollm2", B=4, method="grpo"):
    """What is counted are the products that the step needs; everything else that it does costs time alone."""
    work.admitting(0)
    policy = work.a_policy("smoke" if quick else shape)
    mine = work.steps(policy, work.some_prompts(policy, 4 * B, 61), work.settings(B, 16), method)
    next(mine)
    needed = flops(lambda: next(mine))
    if work.DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
    found, spent = [], []
    for _ in range(min(times, 5)):
        before, took, after = matmul_rate(), seconds(lambda: next(mine)), matmul_rate()
        spent.append(took)
        found.append(needed / took / ((before + after) / 2))
    low, middle, high = quartiles(found)
    took = statistics.median(spent)
    note = f"{needed / 1e9:,.0f} GFLOP in {1000 * took:.0f} ms, {needed / took / 1e12:.3g} TFLOP/s"
    if work.DEVICE != "cpu":
        note += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most"
    return dict(low=low, middle=middle, high=high, n=len(found), unit="", note=note)


@row("growth", "K from 16 to 64 at T=200, B=2: time of a step", "itself", -1.6)
def growth(quick, times, T=200, B=2):
    policy = work.a_policy("smoke" if quick else "tiny", T)
    prompts = work.some_prompts(policy, 16, T)
    few, many = (work.steps(work.copied(policy), prompts, work.settings(B, K)) for K in (16, 64))
    return ratios(in_turn(lambda: [next(many) for _ in range(3)], lambda: [next(few) for _ in range(3)], times), False)


@row("constrained-step", "AdaGRPO step, one admitted, K=50, T=61, B=4, --constrained, 3,000 items", "without it",
     -1.10)
def constrained_step(quick, times):
    """As long as without, or longer by what the samples that follow the catalogue cost."""
    policy, method = work.a_policy("smoke" if quick else "tiny"), work.admitting(1)
    free, constrained = (work.copied(policy) for _ in range(2))
    constrained.constraint = policy.catalogue
    work.check_constrained(constrained, work.some_prompts(policy, 4, 61).history)
    free, constrained = (work.steps(each, work.some_prompts(policy, 16, 61), work.settings(4, 50), method)
                         for each in (free, constrained))
    pairs = in_turn(lambda: [next(constrained) for _ in range(3)], lambda: [next(free) for _ in range(3)], times)
    return ratios(pairs, False)


@row("core-bare", "the same", "torch by hand, which trusts its input", None, hand="hand_loss")
@row("core", "core functions, forward and backward, B=64, K=32, M=4", "torch by hand, with the core's protections",
     -1.15, hand="guarded_loss")
def core_functions(quick, times, hand, repeat=50):
    case, hand = work.core_case(), getattr(work, hand)
    same = work.check_core(case, hand)

    def of(loss):
        return lambda: [torch.autograd.grad(loss(*case), case[:2]) for _ in range(2 if quick else repeat)]

    return ratios(in_turn(of(work.core_loss), of(hand), times), False, same=same)


@row("toy-all", "--toy --method all, CPU time of everything", "the script of --before", -1.08, most=1,
     arguments=["--method", "all"])
@row("toy", "--toy, CPU time of everything", "the script of --before", -1.08, most=5, arguments=[])
def toy(quick, times, most, arguments):
    """Processes of their own, from the start to the table, in turn. Of all threads; here it is one."""
    smoke = ["--sft-steps", "2", "--rl-steps", "1", "--eval-prompts", "40"] if quick else []

    def of(root):
        with tempfile.TemporaryDirectory() as folder:
            script, before = Path(root).resolve() / "nanoadagrpo.py", resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, script, "--toy", "--device", "cpu", "--out", f"{folder}/run", *arguments,
                            *smoke], check=True, capture_output=True, cwd=folder)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    n = min(times, most)
    if BEFORE:
        return ratios([(of(ROOT), of(BEFORE)) for _ in range(n)], False)
    low, middle, high = quartiles([of(ROOT) for _ in range(n)])
    return dict(low=low, middle=middle, high=high, n=n, unit=" s", note="nothing to compare with: no --before")


# -- how cost grows ----------------------------------------------------------------------------------------------------

USUAL = dict(B=4, K=16, T=61, L=3, M=1, N=3000, layers=4, width=256)
AXES = dict(B=[2, 8], K=[8, 64], T=[31, 241], L=[2, 6], N=[3000, 300000], layers=[2, 8], width=[128, 512])


def step_seconds(times, method, B, K, T, L, M, N, layers, width):
    policy = work.a_policy("tiny", T, L, N, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers)
    mine = work.steps(policy, work.some_prompts(policy, 4 * B, T), work.settings(B, K, negatives=M), method)
    next(mine)
    return statistics.median(seconds(lambda: next(mine)) for _ in range(times))


def predicted(everyone, B, K, T, L, M, N, layers, width):
    """Operations of the products in a step in which everyone is admitted, or nobody."""
    truth, rollouts = B * (T + L - 1), B * K * (L - 1)  # tokens that are run
    passes = 4 if everyone else 1  # sampled, and then scored with a way back, which costs twice the way there
    tokens, heads = 3 * truth + passes * rollouts, 3 * B * L + passes * rollouts
    weights, seen = layers * 16 * width**2, 2 * layers * width * (T + L)  # of a Llama; what a token may see, at most
    return 2 * (weights + seen) * tokens + 2 * work.V * width * heads


def growth_table(quick, times):
    """A step of plain GRPO (everyone admitted) and of AdaGRPO with nobody admitted, one size at a time."""
    rows = []
    for axis, sizes in AXES.items():
        for size in sizes[:1] if quick else sizes:
            at = USUAL | {axis: size}
            cells = [axis, f"{size:,}"]
            for method, everyone in (("grpo", True), (work.admitting(0), False)):
                spent, needed = step_seconds(times, method, **at), predicted(everyone, **at)
                cells += [f"{1000 * spent:.0f}", f"{needed / spent / 1e9:.0f}"]
            rows.append(cells)
            print(" | ".join(cells), flush=True)
    head = ["size", "", "all admitted: ms", "GFLOP/s", "none: ms", "GFLOP/s"]
    return "\n".join("| " + " | ".join(x) + " |" for x in [head, ["---"] + ["---:"] * 5, *rows])


# -- the table ---------------------------------------------------------------------------------------------------------


def met(target, value):
    return value >= target if target > 0 else value <= -target


def line(name, result):
    says, peer, target, _ = ROWS[name]
    target = target if work.DEVICE == "cpu" and result["unit"] != " s" else None  # ratios, on one core
    unit, digits = result["unit"], 2 if result["middle"] < 5 else 1
    low, middle, high = (f"{result[key]:.{digits}f}" for key in ("low", "middle", "high"))
    limit = f"{'at least' if target > 0 else 'at most'} {abs(target):g}{unit}" if target else ""
    spread = f"{low}–{high} ({result['n']})" if result["n"] > 1 else "once"
    times = "/".join(f"{1000 * result[key]:,.0f}" for key in ("ours", "theirs") if result.get(key))
    reached = ("yes" if met(target, result["middle"]) else "**no**") if target else ""
    return [says, peer, limit, f"{middle}{unit}", spread, times, reached, result.get("note", "")]


def markdown(rows):
    head = ["work", "against", "target", "median", "quartiles (pairs)", "ms, ours/theirs", "met", ""]
    used = [any(column) for column in zip(*rows, strict=True)]  # on a GPU there are no targets
    lines = [list(itertools.compress(cells, used)) for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine():
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
                if x.startswith("model name")), platform.processor())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl")
                if importlib.util.find_spec(name)]
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT,
                            capture_output=True, text=True).stdout.strip()
    if work.DEVICE != "cpu":
        cpu = f"{torch.cuda.get_device_name()}, {cpu}"
    return (f"{cpu}, {os.cpu_count()} cores of which one is used; Python {platform.python_version()}, "
            f"{', '.join(versions)}, {'bfloat16' if work.BF16 else 'float32'}, products of large matrices "
            f"{matmul_rate() / 1e9:,.0f} GFLOP/s; seed 0; commit {commit}")


def write(text, what="table", page=ROOT / "docs" / "benchmarks.md"):
    """Between the markers of the page; the rest of it is written by people."""
    begin, end = f"<!-- {what}: speed.py writes from here -->", f"<!-- {what}: to here -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def in_processes_of_their_own(rows, given, results):
    """The results of each row, measured in a new process; a step and its tenth, which are measured together, in one."""
    together = {}
    for name in rows:
        together.setdefault(re.sub("^(step|tenth)-", "", name), []).append(name)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(given.results or f"{folder}/results.json")
        for names in together.values():
            command = [sys.executable, __file__, "--rows", *names, "--times", str(given.times), "--results", str(saved),
                       "--before", given.before]
            done = subprocess.run(command + ["--quick"] * given.quick, check=True, stdout=subprocess.PIPE, text=True)
            lines = done.stdout.splitlines()  # the last ones are a table of all so far
            print(*(x for x in lines if x.split(":")[0] in names), sep="\n", flush=True)
            results = json.loads(saved.read_text()) if saved.exists() else results
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="*", default=[], metavar="ROW", help="of: " + ", ".join(sorted(ROWS)))
    parser.add_argument("--times", type=int, default=10, help="pairs per row")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two pairs: does everything run and agree?")
    parser.add_argument("--results", default="", help="a JSON file to add to, so that rows can be run one by one")
    parser.add_argument("--sizes", action="store_true", help="instead: how a step's time grows with each size")
    parser.add_argument("--words", action="store_true", help="instead: with the model's vocabulary")
    parser.add_argument("--before", default="", help="a checkout of another commit, for --words and toy")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="a GPU has rows of its own, too")
    parser.add_argument("--memory-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    global BEFORE
    BEFORE = given.before
    torch.set_num_threads(1)
    work.DEVICE, work.BF16 = given.device, given.device == "cuda"
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    if given.memory_of:
        print(memory_of(given.memory_of, given.quick))
        return {}
    unknown = set(given.rows) - set(ROWS)
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if given.sizes:
        text = growth_table(given.quick, 1 if given.quick else 5)
        print("\n" + text)
        if given.write:
            write(f"{text}\n\n{machine()}.", "sizes")
        return {}
    if given.words:
        quick = dict(shape="smoke", sizes=[1000]) if given.quick else {}
        head, *rows = vocabulary.table(ROOT, given.before, 1 if given.quick else given.times, **quick)
        text = "\n".join("| " + " | ".join(x) + " |" for x in [head, ["---:"] * len(head), *rows])
        print("\n" + text)
        if given.write:
            write(f"{text}\n\n{machine()}.", "words")
        return {}
    saved = Path(given.results) if given.results else None
    results = json.loads(saved.read_text()) if saved and saved.exists() else {}
    on_cpu = "growth", "constrained-step", "peak", "toy", "toy-all"
    usual = [name for name in ROWS if (name not in on_cpu if given.device == "cuda" else not name.startswith("gpu-"))]
    if given.device == "cpu" and not given.rows:
        results, usual = in_processes_of_their_own(usual, given, results), []
    for name in given.rows or usual:
        if "TRL" in ROWS[name][1] and not importlib.util.find_spec("trl"):
            print(f"{name}: left out, TRL is not installed", flush=True)
            continue
        results[name] = ROWS[name][3](given.quick, 2 if given.quick else given.times)
        agree = ", ".join(f"{what} {x:.1e}" for what, x in results[name].get("same", {}).items())
        print(f"{name}: {' | '.join(line(name, results[name])[2:])}" + (f"; agreement: {agree}" if agree else ""),
              flush=True)
        if saved:
            saved.write_text(json.dumps(results, indent=1))
    order = ["step-16-60", "step-50-60", "step-50-200", "tenth-16-60", "tenth-50-60", "tenth-50-200", "smollm2",
             "smollm2-all", "tenth-smollm2-all", "gpu-step-135", "gpu-tenth-135", "gpu-step-0.6", "gpu-tenth-0.6",
             "gpu-step-64", "gpu-tenth-64", "beams-60", "constrained-60", "beams-200", "constrained-200",
             "gpu-beams-0.6", "memory", "peak", "gpu-mfu-all", "gpu-mfu-none", "gpu-mfu-256", "gpu-mfu-1.7",
             "constrained-step", "growth", "core", "core-bare", "toy", "toy-all"]
    text = markdown([line(name, results[name]) for name in order if name in results])
    print("\n" + text)
    if given.write:
        write(f"{text}\n\n{machine()}.", "table" if given.device == "cpu" else "GPU")
    else:
        print(machine())
    return results


if __name__ == "__main__":
    main()
