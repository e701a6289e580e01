# SPDX-License-Identifier: MIT
"""The path of a GPU, checked on a CPU by pretending: every tensor carries the device that it claims to be on.

Each storage has a note of its device. What is asked for on "cuda" is computed on the CPU and noted as on cuda:0, and
its `device` says so. An operation that mixes devices fails as it would on a GPU; so does a generator of another device.
Where the host would have to wait for the GPU, the place is recorded. Kernels, streams, speed and NCCL are not checked.
"""

import collections
import contextlib
import functools
import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import nanoadagrpo as nano

from .helpers import SHOP, logged, made, save_model, settings
from .shops import jsonl
from .test_resume import OPTIONS, stopped_after

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
Generator, autocast, aten = torch.Generator, torch.autocast, torch.ops.aten

# Operations whose result's shape depends on values: the host waits to learn it. Indices of booleans are among them.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal,
         aten.unique_consecutive, aten.is_nonzero, aten.bincount}


def as_device(x):
    """Of "cuda", "cuda:0", "cpu" or a torch.device; there is one GPU."""
    device = torch.device(x)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def tensors(x):
    """Of nested lists, tuples and dictionaries."""
    if torch.is_tensor(x):
        yield x
    elif isinstance(x, list | tuple | dict):
        for y in x.values() if isinstance(x, dict) else x:
            yield from tensors(y)


class Claimed(Generator):
    """A generator that claims a device, and whose state is on the CPU as that of a GPU is."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.claim = as_device(device)

    device = property(lambda self: self.claim)

    def set_state(self, state):
        if state.device != CPU:
            raise TypeError("a generator's state has to be on the CPU")
        return super().set_state(state)


class Notes:
    """Which storage is on which device, and where the host has waited."""

    def __init__(self):
        self.of, self.waits, self.uploads, self.mixed = {}, [], [], []

    def device(self, x):
        return self.of.get(x.untyped_storage()._cdata, (None, CPU))[1]

    def claim(self, x, device):
        storage = x.untyped_storage()  # the weak reference keeps its address from being given to another one
        self.of[storage._cdata] = StorageWeakRef(storage), device
        if len(self.of) > 20_000:
            self.of = {key: (ref, where) for key, (ref, where) in self.of.items() if not ref.expired()}

    def record(self, what, of):
        frame = sys._getframe(1)
        while frame and (frame.f_code.co_filename != nano.__file__ or frame.f_code.co_name[0] == "<"):
            frame = frame.f_back
        of.append((frame.f_code.co_name if frame else "?", what))


class Operations(TorchDispatchMode):
    """Every operation, also those of a backward pass and within other operations."""

    def __init__(self, notes, calls):
        super().__init__()
        self.notes, self.calls = notes, calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        notes, packet, kwargs = self.notes, func.overloadpacket, kwargs or {}
        inputs = [*tensors((args, kwargs))]
        found = [notes.device(x) for x in inputs]
        # As on a GPU: a number that is a tensor without dimensions may stay on the CPU, in arithmetic alone. So may
        # indices, which are then copied.
        number, indexed = torch.Tag.pointwise in func.tags, packet in (aten.index, aten.index_put, aten.index_put_)
        indices = [x for x in args[1] if x is not None] if indexed else []
        devices = {d for d, x in zip(found, inputs, strict=True) if not (
            d == CPU and ((number and x.dim() == 0) or (any(x is y for y in indices) and found[0] == CUDA)))}
        if len(devices) > 1 and packet not in (aten.copy_, aten._to_copy):
            fault = f"{func}: tensors on {sorted(map(str, devices))}, expected all on the same device"
            notes.record(fault, notes.mixed)
            raise RuntimeError(fault)
        device = CUDA if CUDA in found else CPU if found else self.calls.device
        if device == CUDA:
            if any(notes.device(x) == CPU for x in indices):
                notes.record(str(packet), notes.uploads)
            by_boolean = any(x.dtype == torch.bool for x in indices)
            if packet in WAITS or by_boolean or (packet == aten.repeat_interleave and "Tensor" in str(func)):
                notes.record(str(packet), notes.waits)
            if packet == aten.copy_ and found[0] != found[1]:
                notes.record(str(packet), notes.waits if found[0] == CPU else notes.uploads)
        known = {x.untyped_storage()._cdata for x in inputs}
        result = func(*args, **kwargs)
        for x in tensors(result):
            if x.untyped_storage()._cdata not in known:
                notes.claim(x, device)
        return result


class Calls(TorchFunctionMode):
    """Every call from Python, before it is taken apart: what devices are asked for and asked about."""

    MOVES = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)
    READS = (torch.Tensor.numpy, torch.Tensor.__array__)  # only of the CPU's memory

    def __init__(self, notes):
        super().__init__()
        self.notes, self.device = notes, CPU

    def move(self, func, x, *args, copy=False, **kwargs):
        if func is torch.Tensor.to:
            args = [self.notes.device(y) if torch.is_tensor(y) else y for y in args]
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        else:
            device, dtype = torch.device("cuda" if func is torch.Tensor.cuda else "cpu"), None
        before = self.notes.device(x)
        after = as_device(device) if device is not None else before
        moved = x.to(dtype or x.dtype, copy=copy or before != after)
        if before != after:
            self.notes.record("to", self.notes.waits if after == CPU else self.notes.uploads)
            self.notes.claim(moved, after)
        return moved

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, notes = dict(kwargs or {}), self.notes
        if func == torch.Tensor.device.__get__:
            return notes.device(args[0])
        if func == torch.Tensor.is_cuda.__get__:
            return notes.device(args[0]) == CUDA
        if func in self.MOVES:
            return self.move(func, *args, **kwargs)
        inputs = [notes.device(x) for x in tensors((args, kwargs))]
        device = CUDA if CUDA in inputs else CPU
        if func in self.READS and device == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.tolist and device == CUDA:
            notes.record("tolist", notes.waits)
            return self.quietly(args[0].tolist)
        if kwargs.get("device") is not None:
            device = as_device(kwargs["device"])
            kwargs["device"] = "cpu" if device == CUDA else device
        generator = kwargs.get("generator")
        if generator is not None and generator.device != device:
            fault = f"expected a generator on {device}, got one on {generator.device}"
            notes.record(fault, notes.mixed)
            raise RuntimeError(fault)
        before, self.device = self.device, device
        try:
            result = func(*args, **kwargs)
        finally:
            self.device = before
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy) and notes.device(result) != device:
            notes.claim(result, device)
            if device == CUDA and result.numel():
                notes.record("tensor", notes.uploads)
        return result

    def quietly(self, call):
        """Without its parts' being counted too."""
        waits, self.notes.waits = self.notes.waits, []
        try:
            return call()
        finally:
            self.notes.waits = waits


@contextlib.contextmanager
def pretended():
    """A machine with one GPU, for as long as it lasts; yields its notes."""
    notes = Notes()
    calls = Calls(notes)

    def group(lists, with_indices=False):  # optimizers ask it for tensors of the same device and type
        found = collections.defaultdict(list)
        for i, x in enumerate(lists[0]):
            found[notes.device(x), x.dtype].append(i)
        return {key: ([[some[i] for i in at] if some else [] for some in lists], at) for key, at in found.items()}

    def on_cuda(kind, *args, **kwargs):
        assert kind == "cuda", f"autocast for {kind}"
        return autocast("cpu", *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Claimed)
        patch.setattr(torch, "autocast", on_cuda)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # asks the driver
            patch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        with calls, Operations(notes, calls):
            yield notes


def test_what_a_gpu_refuses_is_refused_and_where_the_host_would_wait_is_noted():
    with pretended() as notes:
        here, there = torch.arange(4.0), torch.arange(4.0, device="cuda")
        assert (here.device, there.device, (there + 1)[1:].device) == (CPU, CUDA, CUDA)
        assert (there * torch.tensor(2.0)).device == CUDA, "a number may stay on the CPU"
        assert there[torch.tensor([0, 1])].device == CUDA, "and so may indices"
        assert there.new_zeros(2).device == torch.block_diag(there, there).device == CUDA
        assert here.to(there).device == CUDA and here.device == CPU and there.cpu().device == CPU
        for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()],
                      lambda: torch.stack([there[0], torch.tensor(1.0)])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        dice = torch.Generator("cuda:0").manual_seed(0)
        assert torch.rand(2, generator=dice, device="cuda").device == CUDA
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=dice)
        with pytest.raises(TypeError, match="state"):
            dice.set_state(dice.get_state().to("cuda"))
        weight = torch.ones(4, device="cuda", requires_grad=True)
        (weight * there).sum().backward()
        assert weight.grad.device == CUDA
        notes.waits.clear()
        for wait in (there.tolist, there.max().item, there[0].__bool__, there.cpu, there.nonzero, there.unique,
                     lambda: here.copy_(there), lambda: there[there > 1],
                     lambda: there.repeat_interleave(there.long())):
            before = len(notes.waits)
            wait()
            assert len(notes.waits) == before + 1, notes.waits[before:]
        here.tolist(), here.max().item(), there.sort(), there[1:].cumsum(0), torch.where(there > 1, there, 0.0)
        assert len(notes.waits) == 9


def shop_and_policy(**changes):
    cfg = settings(device="cuda", batch_size=8, group_size=6, sft_batch_size=8, beam_width=12, max_history=3, rho=0.5,
                   tau=0.5, **changes)
    shop = nano.toy_world(cfg, SHOP)
    ranker = nano.train_ranker(shop.catalogue, shop.log, cfg, epochs=1)
    return cfg, shop, ranker, nano.tiny_policy(shop.catalogue, cfg, width=16)


@pytest.fixture
def prefills(monkeypatch):
    """A list that is as long as there have been calls of `prefill`."""
    calls, prefill = [], nano.prefill
    monkeypatch.setattr(nano, "prefill", lambda *args: calls.append(1) or prefill(*args))
    return calls


def allowed(prefills, gates=0, steps=0, lines=0, **more):
    """How often the host may wait, by the function of the script."""
    times = dict(prefill=len(prefills), train_rl=gates, step=steps, __call__=lines, **more)
    return collections.Counter(times)


def waited(notes):
    return collections.Counter(where for where, _ in notes.waits)


@pytest.mark.parametrize("method, more", [
    ("adagrpo", dict(updates=2, micro_batch_size=3, constrained=True)), ("grpo", {}),
    ("random-gate", dict(constrained=True)), ("nll", dict(updates=2))])
def test_a_step_waits_for_the_gpu_once_per_prefill_at_the_gate_for_the_norm_and_for_the_log(
        tmp_path, prefills, method, more):
    with pretended() as notes:
        cfg, shop, ranker, policy = shop_and_policy(rl_steps=3, sft_steps=0, **more)
        log = nano.MetricsLog(tmp_path, cfg, [])
        notes.waits.clear(), notes.uploads.clear(), prefills.clear()
        nano.train_rl(policy, nano.make_reward(ranker, cfg), shop.rl, cfg, method, log)
        parts = len(nano.local_micro_batches(8, cfg.micro_batch_size))
        gates = 0 if method == "nll" else 3 * parts
        assert waited(notes) <= allowed(prefills, gates, 3 * cfg.updates, 3), notes.waits
        uploads = collections.Counter(where for where, _ in notes.uploads)
        assert uploads <= collections.Counter(train_rl=1), "the order"
        admitted = [row.get("admitted", 0.0) for row in log.rows]
        assert method in ("nll", "grpo") or 0 < sum(admitted) < 3, "some are admitted, and not all"
        assert {x.device for x in policy.model.parameters()} == {CUDA}


def test_supervised_steps_ranker_and_evaluation_wait_as_seldom(tmp_path, prefills):
    with pretended() as notes:
        cfg, shop, ranker, policy = shop_and_policy(sft_steps=3, micro_batch_size=4, eval_batch_size=16)
        steps = max(100, len(shop.log.item) // 64)
        assert waited(notes) <= allowed(prefills, steps=steps, train_ranker=1), "and once for the rows' lengths"
        notes.waits.clear(), notes.uploads.clear()
        nano.train_sft(policy, shop.sft, cfg, nano.MetricsLog(tmp_path, cfg, []))
        assert waited(notes) <= allowed(prefills, steps=3, lines=3)
        assert len(notes.uploads) == 1, "the order of the prompts"
        notes.waits.clear(), prefills.clear()
        metrics, each = nano.evaluate(policy, ranker, shop.test.rows(slice(40)), cfg)
        assert len(prefills) == 3 and each["rank"].device == CUDA
        assert waited(notes) <= allowed(prefills, evaluate=len(prefills) + len(metrics)), "finite?, and the means"


def test_a_reward_of_ones_own_may_be_computed_on_the_cpu(monkeypatch):
    price = torch.arange(100.0)

    def score(history, item):
        assert item.device == history.device == CUDA
        return {"a list": price[item.cpu()].tolist(), "a tensor": price[item.cpu()]}

    monkeypatch.setattr(nano, "score", score, raising=False)
    with pretended() as notes:
        cfg, shop, _, policy = shop_and_policy(rl_steps=2, reward="nanoadagrpo:score", constrained=True)
        nano.train_rl(policy, functools.partial(nano.own_reward, cfg, []), shop.rl, cfg, "grpo+nll", lambda **row: None)
        assert not notes.mixed


@pytest.fixture
def data(folder, brief):
    jsonl(folder / "shop")
    save_model(folder / "model")
    return folder


def test_a_whole_run_on_a_pretended_gpu_stops_goes_on_and_comes_to_the_cpus_bits(data, monkeypatch):
    given = ["--data", "shop", *OPTIONS, "--model", "model", "--max-history", "8", "--dtype", "bfloat16",
             "--constrained", "--method", "adagrpo,grpo", "--rl-steps", "3", "--micro-batch-size", "2",
             "--keep", "best", "--beam-width", "10"]
    nano.main([*given, "--out", "cpu"])
    with pretended() as notes:
        given[given.index("cpu")] = "auto"
        stopped_after(monkeypatch, 12, lambda: nano.main([*given, "--out", "cuda"]))
        assert notes.of and not notes.mixed
        [checkpoint] = (data / "cuda").glob("checkpoint-*")
        assert checkpoint.stat().st_size > 10_000
    with pretended() as notes:  # another process, which knows nothing of the first one's storages
        nano.main(["--resume", "cuda"])
        assert not notes.mixed and logged(data / "cuda") == logged(data / "cpu")
    assert made(data / "cuda") == made(data / "cpu")
    assert all("memory" in line for line in (data / "cuda" / "metrics.jsonl").read_text().splitlines())


# -- planted faults: what each of them would be on a GPU is found ------------------------------------------------------


def three_steps(notes):
    cfg, shop, ranker, policy = shop_and_policy(rl_steps=3, constrained=True)
    notes.waits.clear()
    nano.train_rl(policy, nano.make_reward(ranker, cfg), shop.rl, cfg, "adagrpo", lambda **row: None)


def test_a_tensor_left_on_the_cpu_is_found(monkeypatch):
    advantages = nano.core.group_advantages
    monkeypatch.setattr(nano.core, "group_advantages", lambda rewards: torch.as_tensor(advantages(rewards)).cpu())
    with pretended() as notes, pytest.raises(RuntimeError, match="same device"):
        three_steps(notes)
    assert [where for where, _ in notes.mixed] == ["train_rl"]


def test_a_generator_of_the_cpu_is_found(monkeypatch):
    make = nano.make_generator
    monkeypatch.setattr(nano, "make_generator", lambda seed, purpose, device="cpu": make(seed, purpose))
    with pretended() as notes, pytest.raises(RuntimeError, match="generator"):
        three_steps(notes)
    assert [where for where, _ in notes.mixed] == ["rollout"]


def test_waiting_for_every_token_is_found(monkeypatch, prefills):
    parents = nano.unbranched
    monkeypatch.setattr(nano, "unbranched", lambda *args: parents(*args).clamp(max=parents(*args).max().item()))
    with pretended() as notes:
        three_steps(notes)
    assert not waited(notes) <= allowed(prefills, 3, 3)
    assert waited(notes)["select"] == 3 * 3, "in three steps, at three levels"
