# SPDX-License-Identifier: MIT
"""Micro-batches and several processes are a matter of memory and time: the training is that of the whole batch."""

import datetime
import functools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import nanoadagrpo as nano

from .helpers import distance, listen, refused, state
from .shops import jsonl
from .test_step import CATALOGUE, METHODS, PROMPTS, cfg, policy_of, train

every_method = pytest.mark.parametrize("name", METHODS)
EXACT = {"difficult", "easy", "reliable", "not_prominent", "not_suppressed", "admitted", "zero_spread",
         "duplicate_rollouts", "invalid_rollouts"}


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


@functools.cache
def by_one_with_the_whole(name):
    """What micro-batches and processes are compared with."""
    return sft() if name == "sft" else train(name, cfg(**SHARED))


@pytest.mark.parametrize("size", [1, 3])  # of 8; 2 is what each of the two processes below takes
@every_method
def test_micro_batches_change_neither_loss_nor_gate_nor_negatives(name, size):
    whole, rows = by_one_with_the_whole(name)
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
    (whole, rows), (parts, part_rows) = by_one_with_the_whole("sft"), sft(micro_batch_size=1)
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

ROOT, REPOSITORY = os.path.dirname(nano.__file__), str(pathlib.Path(__file__).parents[2])
SHARED = dict(batch_size=8, rl_steps=2, updates=2, epsilon=0.01, negatives=1, rho=0.8)
# First the script itself, as torchrun starts it. Then every method in float64, each process with its share of the
# batch, two micro-batches each; the first one writes it down.
ONE_GROUP = """
import torch.distributed as dist
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # not yet: there is no second group
"""
WORKER = ONE_GROUP + """
import json, pathlib, runpy
from safetensors.torch import save_file
import nanoadagrpo as nano
runpy.run_path(nano.__file__, run_name="__main__")
from tests.nano.test_processes import MODEL, OPTIONS, SHARED, judged, sft, stopped_and_resumed, summed
from tests.nano.test_step import METHODS, cfg, train
stopped_and_resumed("half")
nano.main([*OPTIONS, *MODEL, "--out", "pictures-two"])
if dist.get_rank() == 0:
    save_file(judged(), "judged.safetensors")
    open("summed.json", "w").write(json.dumps(summed()))
else:
    judged(), summed()
for name in ["sft", *METHODS]:
    made, rows = sft(micro_batch_size=2) if name == "sft" else train(name, cfg(**SHARED, micro_batch_size=2))
    if dist.get_rank() == 0:
        save_file({key: x.clone() for key, x in made.items()}, f"{name}.safetensors")
        open(f"{name}.json", "w").write(json.dumps([{k: float(v) if hasattr(v, "item") else v for k, v in row.items()}
                                                    for row in rows]))
    dist.barrier()
number = dist.get_rank()
destroy()
names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
pathlib.Path(f"threads-{number}.json").write_text(json.dumps([name for name in names if "gloo" in name]))
dist.destroy_process_group = destroy
for i in range(3):  # a group for each
    nano.main([*OPTIONS, "--out", f"again-{i}"])
"""
# Scores of each process's own rows, in several parts.
TWO_SCORES = """
def reward(history, item):
    return {'last': (item * 7 + history[:, -1:] * 3) % 10 / 10, 'item': item % 4 / 4}
"""
OPTIONS = ["--data", "shop", "--device", "cpu", "--sft-steps", "4", "--sft-batch-size", "8", "--rl-steps", "4",
           "--batch-size", "4", "--group-size", "8", "--eval-prompts", "8", "--beam-width", "6", "--tau", "0.5",
           "--rho", "0.6", "--save-every", "2", "--method", "adagrpo-d", "--reward", "two_scores:reward"]

MODEL = ["--model", "pictures", "--method", "grpo+nll", "--updates", "2", "--micro-batch-size", "1"]


def save_model_that_sees_pictures(folder):
    """Weights of which no text makes use, and which so have no gradient."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(sizes, vocab_size=24, num_key_value_heads=1, head_dim=8, sliding_window=512)
    vision = dict(sizes, image_size=4, patch_size=2)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)


def judged():
    """What `evaluate` says of each prompt, and the weights of a ranker; 7 prompts, 3 and 1 at a time."""
    c = cfg(eval_batch_size=3, beam_width=10)
    ranker = nano.train_ranker(CATALOGUE, clicks(), c)
    numbers, each = nano.evaluate(policy_of(), ranker, PROMPTS.rows(slice(7)), c)
    mean = {f"mean/{key}": torch.tensor(x, dtype=torch.float64) for key, x in numbers.items()}
    return mean | each | {f"ranker/{key}": x.clone() for key, x in ranker.state_dict().items()}


def summed():
    """Gradients of four weights, of which process n has used the n-th and the last, after `sum_gradients`."""
    weights = torch.nn.ParameterList(torch.ones(2) for _ in range(4))
    number = nano.rank()
    ((number + 1) * weights[number] + (number + 5) * weights[3]).sum().backward()
    nano.sum_gradients(weights)
    return [None if x.grad is None else x.grad.tolist() for x in weights]


def clicks():
    item = (torch.arange(16)[:, None] + torch.arange(3)) % CATALOGUE.N
    return nano.ImpressionLog(PROMPTS.history[torch.arange(16) % len(PROMPTS.target)], item, item % 3 == 0, None)


def stopped_and_resumed(half, *more):
    """The run of OPTIONS once more into `half`, interrupted in the middle of its steps and resumed."""
    argv = [*OPTIONS, *more, "--out", half]
    call = nano.MetricsLog.__call__

    def interrupted(log, **row):
        if row["phase"] == "rl" and row["step"] == 4:  # of all processes
            raise KeyboardInterrupt
        return call(log, **row)

    nano.MetricsLog.__call__ = interrupted
    try:
        nano.main(argv)
    except SystemExit as end:
        assert end.code == 130
    else:
        raise AssertionError("was not interrupted")
    nano.MetricsLog.__call__ = call
    nano.main(["--resume", half])


def written(out):
    """What a run has logged, but for what no seed decides."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if key not in ("seconds", "memory")} for row in rows]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder in which two processes have run all this; and what they printed."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "worker.py").write_text(WORKER)
    (folder / "two_scores.py").write_text(TWO_SCORES)
    jsonl(folder / "shop")
    save_model_that_sees_pictures(folder / "pictures")
    return folder, by_torchrun(2, "worker.py", *OPTIONS, "--out", "two", cwd=folder).stdout


def by_torchrun(n, *words, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, REPOSITORY, str(cwd)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
               f"--nproc_per_node={n}", *words]  # the machine's own name may have no address
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("name", ["sft", *METHODS])
def test_two_processes_with_half_the_batch_each_train_as_one_with_the_whole(together, name):
    alone, rows = by_one_with_the_whole(name)
    made = load_file(together[0] / f"{name}.safetensors")
    assert distance(alone, state(policy_of())) > 1e-3
    assert distance(alone, made) < 1e-9, name
    same_rows(json.loads((together[0] / f"{name}.json").read_text()), rows, 1e-6)


def test_torchrun_of_the_script_gives_the_run_of_one_process_written_once(together, monkeypatch):
    folder, printed = together
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    nano.main([*OPTIONS, "--out", "one"])
    one, two = (written(folder / out) for out in ("one", "two"))
    assert [row.keys() for row in one] == [row.keys() for row in two] and "reward/last" in one[-3]
    for ours, theirs in zip(one, two, strict=True):
        assert {k: v for k, v in ours.items() if k in ("phase", "step", "method", *EXACT)} == {
            k: v for k, v in theirs.items() if k in ("phase", "step", "method", *EXACT)}
        if "nll" in ours:
            assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-3)
    assert sorted(path.name for path in (folder / "two").iterdir()) == sorted(
        path.name for path in (folder / "one").iterdir()), "one process writes, once"
    assert len(re.findall("^two: policy", printed, re.MULTILINE)) == 1
    assert len(re.findall(r"\| +adagrpo-d +\|", printed)) == 5, "of this run, the resumed one and three more"


def test_two_processes_train_a_model_with_weights_that_no_text_uses(together, monkeypatch):
    folder, _ = together
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    nano.main([*OPTIONS, *MODEL, "--out", "pictures-one"])
    one, two, start = (load_file(folder / name / "model.safetensors")
                       for name in ("pictures-one/policy", "pictures-two/policy", "pictures"))
    assert any("vision" in name for name in one) and one.keys() == two.keys()
    assert all(torch.equal(one[name], start[name]) == ("layers" not in name or "vision" in name) for name in one
               if one[name].shape == start[name].shape and "norm" not in name)
    assert distance(one, two) < 1e-4


def test_evaluation_is_shared_out_and_the_ranker_trained_once(together):
    """To the same numbers, also where processes do not have equally many prompts."""
    alone, shared = judged(), load_file(together[0] / "judged.safetensors")
    assert alone.keys() == shared.keys() and "mean/hr@10" in alone
    for key, x in alone.items():
        torch.testing.assert_close(shared[key].double(), x.double(), rtol=1e-5, atol=1e-7)


def same_bits(one, other):
    files = "policy/model.safetensors", "ranker.safetensors"
    return written(one) == written(other) and all((one / x).read_bytes() == (other / x).read_bytes() for x in files)


def test_two_processes_resume_to_the_same_bits(together):
    assert same_bits(together[0] / "half", together[0] / "two")


@pytest.mark.skipif("DEEP_TESTS" not in os.environ, reason="DEEP_TESTS=1: three more starts of three processes")
def test_three_processes_resume_to_the_same_bits(tmp_path):
    """Of three numbers, unlike two, the sum depends on the order, which may not depend on when a run was begun."""
    (tmp_path / "two_scores.py").write_text(TWO_SCORES)
    jsonl(tmp_path / "shop")
    sizes = ["--sft-batch-size", "9", "--batch-size", "6"]
    (tmp_path / "worker.py").write_text(f"{ONE_GROUP}from tests.nano.test_processes import stopped_and_resumed\n"
                                        f"stopped_and_resumed('half', *{sizes})\ndestroy()")  # fmt: skip
    by_torchrun(3, nano.__file__, *OPTIONS, *sizes, "--out", "three", cwd=tmp_path)
    by_torchrun(3, "worker.py", cwd=tmp_path)
    assert same_bits(tmp_path / "half", tmp_path / "three")


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are listed there on Linux alone")
def test_no_thread_of_the_processes_group_outlives_it(together):
    """One that is still at work while Python ends makes the process abort: a complete run then counts as failed."""
    assert [(together[0] / f"threads-{number}.json").read_text() for number in (0, 1)] == ["[]", "[]"]


def test_processes_may_train_several_times_in_one_python(together):
    """The faster one does not take what the last group has left in torch's store for the new one."""
    assert all(same_bits(together[0] / f"again-{i}", together[0] / "two") for i in range(3))


def test_gradients_are_summed_where_a_process_has_not_used_a_weight(together):
    """What none has used stays without, so that the optimizer leaves it alone."""
    assert json.loads((together[0] / "summed.json").read_text()) == [[1, 1], [2, 2], None, [11, 11]]


def test_a_reward_that_fails_in_another_process_alone_is_not_told_as_this_ones_fault(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "two_scores.py").write_text(TWO_SCORES)
    jsonl(tmp_path / "shop")

    def all_gather(pieces):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:34448")

    monkeypatch.setattr(nano, "all_gather", all_gather)
    line = refused(capsys, lambda: nano.main([*OPTIONS, "--out", "here"]))
    assert line.startswith("nanoadagrpo: another process has stopped")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_while_the_script_loads_ends_without_a_traceback(rank, tmp_path):
    """Also in the other processes. A module that stands in for NumPy's holds the loading up."""
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "RANK": rank}
    done = subprocess.run([sys.executable, nano.__file__, "--toy"], env=environment, cwd=tmp_path, capture_output=True,
                          text=True, timeout=50)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def as_torchrun_does(processes, number):
    """The environment of one process, and a free port to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return {"WORLD_SIZE": processes, "RANK": number, "LOCAL_RANK": number, **where}


def test_a_process_that_waits_for_another_hears_a_signal(tmp_path):
    """The other one never comes. What waits is no Python, and would not hand the signal on to it."""
    given = as_torchrun_does("2", "0")
    environment, port = {**os.environ, "PYTHONPATH": ROOT, **given}, int(given["MASTER_PORT"])
    command = [sys.executable, nano.__file__, "--toy", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    for _ in range(600):  # until it listens: then it waits
        time.sleep(0.1)
        with socket.socket() as line:
            if line.connect_ex(("127.0.0.1", port)) == 0:
                break
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=30) in (-signal.SIGTERM, 143)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_alone_says_that_a_signal_has_stopped_them(monkeypatch, capsys, rank):
    """The others do not know the folder, nor its checkpoints."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(nano, "run", lambda cfg: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        nano.main(["--toy", "--device", "cpu"])
    assert end.value.code == 143 and len(capsys.readouterr().err.splitlines()) == (rank == "0")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_each_says_what_is_wrong(monkeypatch, capsys, rank):
    """The first one may know nothing of it."""
    monkeypatch.setenv("RANK", rank)
    line = refused(capsys, lambda: nano.main(["--toy", "--group-size", "1"]))
    assert line.startswith("nanoadagrpo: --group-size 1: must be")


def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch, capsys, tmp_path):
    """And nothing is begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nano, "world_size", lambda: 3)
    for flag, size, other in (("--sft-batch-size", 128, "--batch-size"), ("--batch-size", 64, "--sft-batch-size")):
        line = refused(capsys, lambda other=other: nano.main(["--toy", "--device", "cpu", other, "9"]))
        assert re.search(rf"{flag} {size}\b.*: 3 processes cannot share", line)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(nano, "toy_world", lambda cfg: sys.exit(77))  # it would begin now
    with pytest.raises(SystemExit, match="77"):
        nano.main(["--toy", "--device", "cpu", "--sft-batch-size", "9", "--batch-size", "6"])


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "RANK": "0"},
                                   {"WORLD_SIZE": ""}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}], ids=str)
def test_a_part_of_what_torchrun_sets_is_one_line(given, monkeypatch, capsys, tmp_path):
    """Batch systems and containers export some of it."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    line = refused(capsys, lambda: nano.main(["--toy", "--device", "cpu", "--out", str(tmp_path / "out")]))
    assert line.startswith("nanoadagrpo: WORLD_SIZE is set, as torchrun sets it: ")
    assert line.endswith("; start with torchrun, or unset it") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["0", "1"])
def test_processes_that_never_come_are_waited_for_for_minutes(number, monkeypatch, capsys, tmp_path):
    """Those of a torchrun that was killed while they loaded tried to connect for a day. Here, minutes are seconds."""
    for name, value in as_torchrun_does("2", number).items():
        monkeypatch.setenv(name, value)
    meet = dist.rendezvous

    def sooner(url, timeout):
        assert datetime.timedelta(minutes=1) <= timeout <= datetime.timedelta(minutes=30)
        return meet(url, timeout=timeout / 300)

    monkeypatch.setattr(dist, "rendezvous", sooner)
    line = refused(capsys, lambda: nano.main(["--toy", "--device", "cpu", "--out", str(tmp_path / "out")]))
    assert line.startswith("nanoadagrpo: WORLD_SIZE is set") and not (tmp_path / "out").exists()


def test_processes_that_have_met_wait_for_each_other_for_hours(monkeypatch, tmp_path):
    """The first one trains the ranker while the others wait; GPUs also meet in the store, at their first sum."""
    for name, value in as_torchrun_does("1", "0").items():
        monkeypatch.setenv(name, value)
    met = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: met.update(given))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(nano, "run", lambda cfg: None)
    nano.main(["--toy", "--device", "cpu"])
    assert min(met["timeout"], met["store"].timeout) >= datetime.timedelta(hours=10)


@pytest.mark.parametrize(("processes", "local"), [("1", "0"), ("4", "3")])
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_each_process_of_torchrun_has_the_gpu_of_its_number(processes, local, device, monkeypatch):
    tried = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda n, device: tried.append(device) or torch.ones(n))
    cfg = nano.parse(["--toy", "--device", device])
    assert cfg.device == f"cuda:{local}" and tried == [cfg.device]  # torch.cuda.set_device refuses a bare "cuda"
    assert nano.parse(["--toy", "--device", "cpu"]).device == "cpu"
