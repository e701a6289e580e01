# SPDX-License-Identifier: MIT
"""Own rewards and negatives, logging elsewhere, memory, and where the host waits for the GPU."""

import json
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adagrpo_core as core
import nanoadagrpo as nano

from .helpers import QUICK, settings
from .shops import jsonl
from .test_step import CATALOGUE, METHODS, PROMPTS, cfg, policy_of, train


@pytest.fixture
def mine(folder, monkeypatch):
    """mine(text): a module of that text that can be imported here as `mine`."""
    jsonl(folder / "shop")

    def write(text):
        (folder / "mine.py").write_text("import torch\n" + text)
        sys.modules.pop("mine", None)

    yield write
    sys.modules.pop("mine", None)


def run(*arguments):
    return nano.main(["--data", "shop", "--device", "cpu", *QUICK, "--batch-size", "4", *arguments])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    err = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(err) == 1
    return err[0].removeprefix("nanoadagrpo: ")


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_an_own_reward_is_what_the_step_is_given_and_hallucinations_get_the_floor(mine, monkeypatch):
    mine("def score(history, item):\n    assert history.ndim == 2 and item.max() < 9\n    return item * 0.1 + 0.5\n")
    reward = nano.own_reward(settings(reward="mine:score", floor=-3.0))
    item = torch.tensor([[0, -1, 4], [8, 2, -1]])
    [scores] = reward(torch.zeros(2, 3), item).values()
    torch.testing.assert_close(scores, torch.tensor([[0.5, -3.0, 0.9], [1.3, 0.7, -3.0]]))
    seen, group = [], core.group_advantages
    monkeypatch.setattr(core, "group_advantages", lambda rewards: seen.append(rewards) or group(rewards))
    run("--reward", "mine:score", "--floor", "-3", "--group-size", "40", "--out", "here")
    values = {round(x, 4) for rewards in seen if torch.is_tensor(rewards) for x in rewards.flatten().tolist()}
    assert values <= {-3.0, *(round(0.5 + 0.1 * i, 4) for i in range(9))} and len(values) > 2


def test_named_scores_are_summed_and_each_is_logged(mine, folder):
    mine("def score(history, item):\n    return {'a': item * 0.25, 'b': item.numpy() * 0.5}\n"
         "def sum(history, item):\n    return item * 0.75\n")
    both = nano.own_reward(settings(reward="mine:score", floor=-2.0))
    whole = nano.own_reward(settings(reward="mine:sum", floor=-2.0))
    item = torch.tensor([[0, -1, 4], [8, 2, -1]])
    everyone, history = slice(0, 2), torch.zeros(2, 3)
    (scores, named), (expected, _) = (nano.ask(r, history, item, everyone) for r in (both, whole))
    assert torch.equal(scores, expected)
    assert {k: v.item() for k, v in named.items()} == pytest.approx({"reward/a": 1.5 / 6, "reward/b": 5.0 / 6})
    results = [run("--reward", f"mine:{name}", "--out", name) for name in ("score", "sum")]
    assert results[0] == results[1]
    assert all({"reward/a", "reward/b"} <= row.keys() for row in lines(folder / "score" / "metrics.jsonl")
               if row["phase"] == "rl")


@pytest.mark.parametrize(
    "text, words",
    [
        ("def score(history, item):\n    return item * float('nan')\n", ["mine:score", "of step 1 are not finite"]),
        ("def score(history, item):\n    return item / 0\n", ["mine:score", "not finite"]),
        ("def score(history, item):\n    return item[:, :3] * 1.0\n", ["mine:score", "(4, 3)", "expected (4, 8)"]),
        ("def other(history, item):\n    return item\n", ["mine:score", "package.module:function"]),
        ("import no_such_library\n", ["mine:score", "no_such_library"]),
    ],
    ids=["nan", "inf", "shape", "no function", "no import"],
)
def test_a_reward_that_cannot_be_used_is_named_in_one_line(mine, capsys, text, words):
    mine(text)
    line = refused(capsys, "--reward", "mine:score", "--method", "grpo+nll")
    assert line.startswith("--reward ") and all(word in line for word in words)


# -- negatives ---------------------------------------------------------------------------------------------------------


def negatives_asked(monkeypatch, source, m=2, **changes):
    """(targets, negatives) of every step of a training run."""
    c, seen = cfg(negatives=m, negatives_from=source, rl_steps=30, lr=0.0, **changes), []

    def reward(history, item):
        seen.append(item)
        return torch.where(item >= 0, item * 0.1, -1.0)

    list(nano.train_rl(policy_of(), reward, PROMPTS, c, "adagrpo", lambda **row: None,
                       other=nano.own_negatives(CATALOGUE, c)))
    return torch.cat([item[:, 6] for item in seen]), torch.cat([item[:, 7:] for item in seen])


def test_negatives_of_the_catalogue_are_any_item_but_the_truth_equally_often(monkeypatch):
    target, negative = negatives_asked(monkeypatch, "catalogue", m=3)
    assert negative.shape == (150, 3) and negative.min() >= 0 and (negative != target[:, None]).all()
    for truth in target.unique():
        drawn = torch.bincount(negative[target == truth].flatten(), minlength=CATALOGUE.N).float()
        share = drawn / drawn.sum()
        assert share[truth] == 0 and share[torch.arange(CATALOGUE.N) != truth].min() > 0.05


def test_negatives_come_from_an_own_function(mine, monkeypatch):
    mine("def draw(history, target, m, generator):\n    return (target[:, None] + 1 + torch.arange(m)) % 6\n")
    target, negative = negatives_asked(monkeypatch, "mine:draw")
    assert torch.equal(negative, (target[:, None] + torch.tensor([1, 2])) % 6)


def test_one_prompt_per_batch_is_enough_where_negatives_are_no_rollouts(mine):
    with pytest.raises(nano.BadInput, match="--batch-size 1"):
        settings(batch_size=1)
    assert run("--negatives-from", "catalogue", "--batch-size", "1").keys() == {"base", "adagrpo"}


def test_negatives_from_nowhere_are_refused(mine, capsys):
    mine("")
    assert refused(capsys, "--negatives-from", "catalog").startswith("--negatives-from catalog: ")


# -- logging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_library_is_told_every_number_and_imported_only_when_asked_for(mine, folder, monkeypatch, library):
    fake, begun, told = types.ModuleType(library), [], []
    fake.init, fake.log, fake.__spec__ = lambda **options: begun.append(options), told.append, "installed"
    mine("")
    run("--out", "silent")
    assert library not in sys.modules
    monkeypatch.setitem(sys.modules, library, fake)
    run("--log-to", library, "--out", "here")
    assert begun[0]["project"] == "nanoadagrpo" and begun[0]["config"]["group_size"] == 6
    rows = lines(folder / "here" / "metrics.jsonl")
    assert len(told) == len(rows)
    for row, numbers in zip(rows, told, strict=True):
        name = "/".join(row[key] for key in ("phase", "method") if key in row)
        expected = {f"{name}/{key}": value for key, value in row.items() if not isinstance(value, str)}
        used = {f"{name}/seconds", f"{name}/memory"}
        assert used <= numbers.keys() and {key: x for key, x in numbers.items() if key not in used} == expected
    assert (folder / "silent" / "metrics.jsonl").read_bytes() == (folder / "here" / "metrics.jsonl").read_bytes()


def test_tensorboard_is_told_every_number_at_its_step(mine, folder, monkeypatch):
    told, module = [], types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, place):
            told.append(place)

        def add_scalar(self, key, value, step):
            told.append((key, step))

        def flush(self):
            pass

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(nano.importlib.util, "find_spec", lambda name: "installed")
    mine("")
    run("--log-to", "tensorboard", "--out", "here")
    assert str(told[0]) == "here/tensorboard"
    assert {("sft/nll", 3), ("rl/adagrpo/reward", 2), ("test/adagrpo/hr@10", 2), ("sft/memory", 1)} <= set(told[1:])


@pytest.mark.parametrize("library", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_one_line_with_the_command_that_mends_it(mine, folder, capsys, monkeypatch, library):
    monkeypatch.setattr(nano.importlib.util, "find_spec", lambda name: None)
    mine("")
    line = refused(capsys, "--log-to", library, "--out", "here")
    assert line == f"--log-to {library}: not installed; pip install {library}"
    assert not (folder / "here").exists()


def test_machine_jsonl_has_time_and_memory_of_every_line(mine, folder):
    mine("")
    run("--out", "here")
    rows, used = lines(folder / "here" / "metrics.jsonl"), lines(folder / "here" / "machine.jsonl")
    where = "phase", "method", "step"
    assert [{k: row[k] for k in where if k in row} for row in rows] == [
        {k: row[k] for k in where if k in row} for row in used]
    assert all(row.keys() - set(where) == {"seconds", "memory"} and row["seconds"] >= 0 for row in used)
    memory = [row["memory"] for row in used]
    assert memory == sorted(memory) and 0.05 < memory[0] < 100, "GiB"


# -- where the host waits for the GPU ----------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes every operation whose result the host has to see, as a GPU would make it wait; a CPU does not mind."""

    ASKS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten._unique2",
            "aten.is_nonzero", "aten.equal.", "aten.repeat_interleave.Tensor", "aten.allclose")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        picks = name.startswith(("aten.index.", "aten.index_put", "aten._index_put"))
        if picks and any(x is not None and x.dtype == torch.bool for x in arguments[1]):
            self.seen.append("index by a boolean")
        elif name.startswith(self.ASKS):
            self.seen.append(name)
        return function(*arguments, **(options or {}))


def waits_of_a_step(name, monkeypatch, **changes):
    """What the host waits for from the first sampled token to the optimizer's step."""
    watch, inside = Waits(), []
    sample, step = nano.sample, nano.Learner.step

    def sampling(*arguments):
        pick = sample(*arguments)

        def first(*level):
            if not inside:
                inside.append(watch.__enter__())
            return pick(*level)

        return first

    def stepping(self):
        if inside:
            inside.pop().__exit__(None, None, None)
        return step(self)

    monkeypatch.setattr(nano, "sample", sampling)
    monkeypatch.setattr(nano.Learner, "step", stepping)
    for method in ("tolist", "cpu", "numpy", "item", "__array__"):
        real = getattr(torch.Tensor, method)

        def noted(self, *arguments, real=real, method=method, **options):
            if inside:
                watch.seen.append(method)
            return real(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, method, noted)
    ranker = nano.train_ranker(CATALOGUE, nano.Log(PROMPTS.history, PROMPTS.target[:, None].expand(-1, 3),
                                                   torch.rand(14, 3) < 0.5, None), settings(), epochs=1)
    c = cfg(rl_steps=2, **changes)
    train(name, c, reward=nano.make_reward(ranker, c))
    return watch.seen


@pytest.mark.parametrize("name", [name for name in METHODS if name != "nll"])
def test_between_rollout_and_update_the_host_waits_once_to_learn_who_is_admitted(name, monkeypatch):
    assert waits_of_a_step(name, monkeypatch) == ["tolist"] * 2, "once in each of two steps"


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x.sum()), lambda x: x[x > 0],
    lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x.tolist(), lambda x: torch.equal(x, x), lambda x: x.numpy(),
    lambda x: x.unique()])
def test_a_wait_that_somebody_adds_is_noticed(wait, monkeypatch):
    judge = core.group_advantages

    def waiting(rewards):
        if torch.is_tensor(rewards):  # the settings are checked with arrays
            wait(rewards)
        return judge(rewards)

    monkeypatch.setattr(core, "group_advantages", waiting)
    assert len(waits_of_a_step("adagrpo", monkeypatch)) > 2
