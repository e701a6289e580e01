# SPDX-License-Identifier: MIT
"""Own rewards, logging elsewhere, and where the host waits for the GPU."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adagrpo_core as core
import nanoadagrpo as nano

from . import helpers
from .helpers import distance, logged, run, settings
from .shops import jsonl
from .test_step import CATALOGUE, METHODS, PROMPTS, cfg, train

pytestmark = pytest.mark.usefixtures("brief")


@pytest.fixture
def mine(folder, monkeypatch):
    """mine(text): a module of that text that can be imported here as `mine`."""
    jsonl(folder / "shop")
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the script adds the current folder

    def write(text):
        (folder / "mine.py").write_text("import torch\n" + text)
        sys.modules.pop("mine", None)

    yield write
    sys.modules.pop("mine", None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def own_reward(name, **changes):
    return functools.partial(nano.own_reward, settings(reward=name, **changes), [])


def refused(capsys, *arguments):
    return helpers.refused(capsys, lambda: run(*arguments)).removeprefix("nanoadagrpo: ")


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_an_own_reward_is_what_the_step_is_given_and_hallucinations_get_the_floor(mine, monkeypatch):
    mine("def score(history, item):\n    assert history.ndim == 2 and item.max() < 9\n    return item * 0.1 + 0.5\n")
    reward = own_reward("mine:score", floor=-3.0)
    item = torch.tensor([[0, -1, 4], [8, 2, -1]])
    [scores] = reward(torch.zeros(2, 3), item).values()
    torch.testing.assert_close(scores.float(), torch.tensor([[0.5, -3.0, 0.9], [1.3, 0.7, -3.0]]))
    seen, group = [], core.group_advantages
    monkeypatch.setattr(core, "group_advantages", lambda rewards: seen.append(rewards) or group(rewards))
    run("--reward", "mine:score", "--floor", "-3", "--group-size", "40", "--out", "here")
    values = {round(x, 4) for rewards in seen if torch.is_tensor(rewards) for x in rewards.flatten().tolist()}
    assert values <= {-3.0, *(round(0.5 + 0.1 * i, 4) for i in range(9))} and len(values) > 2


@pytest.mark.parametrize("text", ["item.numpy() * 0.1", "(item * 0.1).tolist()", "(item * 0.1).double()",
                                  "(item * 0.1).requires_grad_()", "(item * 0.1).to(torch.bfloat16)",
                                  "[(row * 0.1).numpy() for row in item]", "[row * 0.1 for row in item]",
                                  "[(row * 0.1).bfloat16() for row in item]",
                                  "tuple(tuple(x * 0.1 for x in row) for row in item.tolist())",
                                  "(item.numpy() * 0.1).view(numpy.matrix)",
                                  "list((item.numpy()[:, ::-1] * 0.1)[:, ::-1])",
                                  "list(numpy.broadcast_to(item.numpy() * 0.1, item.shape))"])
def test_scores_may_be_lists_arrays_and_tensors_of_any_sort(mine, text, recwarn):
    mine(f"import numpy\ndef score(history, item):\n    return {text}\n")
    reward, item = own_reward("mine:score"), torch.tensor([[0, -1, 4], [8, 2, 3]])
    scores, _ = nano.reward_of(reward, torch.zeros(2, 3), item)
    assert scores.dtype == torch.float64 and not scores.requires_grad
    torch.testing.assert_close(scores.float(), torch.tensor([[0, 0, 0.4], [0.8, 0.2, 0.3]]), rtol=0, atol=2e-3)
    assert not recwarn.list


def test_named_scores_are_summed_and_each_is_logged(mine, folder):
    mine("def score(history, item):\n    return {'a': item * 0.25, 'b': item.cpu().numpy() * 0.5}\n"
         "def sum(history, item):\n    return item * 0.75\n")
    both = own_reward("mine:score", floor=-2.0)
    whole = own_reward("mine:sum", floor=-2.0)
    item, history = torch.tensor([[0, -1, 4], [8, 2, -1]]), torch.zeros(2, 3)
    (scores, named), (expected, _) = (nano.reward_of(r, history, item) for r in (both, whole))
    assert torch.equal(scores, expected)
    assert {k: v.item() for k, v in named.items()} == pytest.approx({"reward/a": 1.5 / 6, "reward/b": 5.0 / 6})
    results = [run("--reward", f"mine:{name}", "--out", name) for name in ("score", "sum")]
    assert results[0] == results[1]
    assert all({"reward/a", "reward/b"} <= row.keys() for row in lines(folder / "score" / "metrics.jsonl")
               if row["phase"] == "rl")


def test_a_reward_may_write_into_what_it_is_given_and_into_what_it_gave(mine):
    mine("def honest(history, item):\n    return item * 0.1 + history[:, -1:] * 0.2\n"
         "kept = []\n"
         "def careless(history, item):\n"
         "    found = honest(history, item)\n"
         "    history.fill_(-1)\n"
         "    item.fill_(0)\n"
         "    for old in kept:\n"
         "        old.fill_(9.0)\n"
         "    kept.append(found)\n"
         "    return found\n")
    trained, moved = [], PROMPTS.history.clone()
    for name in "honest", "careless":
        trained.append(train("grpo+nll", cfg(rl_steps=2, micro_batch_size=2),
                             reward=own_reward(f"mine:{name}"))[0])
    assert distance(*trained) == 0 and torch.equal(PROMPTS.history, moved)


def test_a_reward_is_asked_about_two_rows_before_the_supervised_steps(mine, monkeypatch):
    mine("asked = []\ndef score(history, item):\n    asked.append(item.shape)\n    return item * 0.1\n")
    began, train_sft = [], nano.train_sft
    monkeypatch.setattr(nano, "train_sft", lambda *given, **options: (
        began.extend(sys.modules["mine"].asked), train_sft(*given, **options)))
    run("--reward", "mine:score", "--out", "here")
    influence = (3, 12 + 1 + 1)  # of the base policy: its beams, the truth and a negative
    assert began == [(2, 3)] and sys.modules["mine"].asked == [(2, 3), influence, *[(4, 6 + 1 + 1)] * 2]


@pytest.mark.parametrize("options", [["--method", "nll"], ["--rl-steps", "0"]], ids=" ".join)
def test_a_reward_of_which_only_the_table_of_influence_would_make_use_is_checked_too(mine, capsys, folder, options):
    mine("def score(history, item):\n    return item * float('nan')\n")
    assert "a score is not finite" in refused(capsys, "--reward", "mine:score", "--out", "here", *options)
    assert not (folder / "here").exists()


def test_a_reward_may_import_its_neighbours_when_it_is_called_and_leaves_the_path_as_it_was(mine, folder):
    (folder / "neighbour_of_mine.py").write_text("def price(item):\n    return item * 0.5\n")
    mine("def score(history, item):\n    import neighbour_of_mine\n    return neighbour_of_mine.price(item)\n")
    before = [*sys.path]
    reward = own_reward("mine:score")
    [scores] = reward(torch.zeros(1, 2), torch.tensor([[1, 2]])).values()
    assert scores.tolist() == [[0.5, 1.0]] and sys.path == before
    sys.modules.pop("neighbour_of_mine")


def test_copies_of_an_item_have_equal_rewards_whatever_a_product_rounds_to(mine):
    mine("def score(history, item):\n    place = torch.arange(item.shape[1]) * 1e-7\n"
         "    return {'a': item + place, 'b': item * 0 + place}\n")
    item = torch.tensor([[3, 5, 3, -1, 5, -1], [-1, 2, 2, 2, 7, 3]])
    reward = own_reward("mine:score", floor=-1.0)
    scores, parts = nano.reward_of(reward, torch.zeros(2, 3), item)
    for row, x in zip(item.tolist(), scores.tolist(), strict=True):
        assert all(len({x[i] for i in range(6) if row[i] == one}) == 1 for one in row)
    assert parts.keys() == {"reward/a", "reward/b"}


@pytest.mark.parametrize("text", ["item.double() / 8", "(item.double() / 8).tolist()", "item.numpy() / 8"])
def test_scores_that_float32_could_not_tell_apart_are_ranked_as_they_are(mine, text):
    """Seconds since 1970: 1.7e9, where float32 knows every 128th number."""
    mine(f"import torch\ndef score(history, item):\n    return {text}\n"
         "def later(history, item):\n    return item.double() / 8 + 1.7e9\n")
    (first, small), (second, large) = (
        train("grpo+nll", cfg(rl_steps=3), reward=own_reward(f"mine:{name}", floor=floor))
        for name, floor in (("score", 0.0), ("later", 1.7e9)))
    assert large[0]["zero_spread"] == small[0]["zero_spread"] and distance(first, second) < 1e-5


def test_what_a_reward_does_to_torch_does_not_reach_the_policy(mine, folder):
    """It wants another seed, and removes the current folder from the path: training stays the same."""
    mine("import os, sys\nimport torch\n"
         "def plain(history, item):\n    return item * 0.1\n"
         "def rude(history, item):\n"
         "    torch.manual_seed(7)\n"
         "    sys.path[:] = [x for x in sys.path if x != os.getcwd()]\n"
         "    return item * 0.1\n")
    plain, rude = (run("--reward", f"mine:{name}", "--out", name) for name in ("plain", "rude"))
    assert plain == rude


def test_a_read_only_array_of_numpy_is_taken_without_a_warning(mine, folder, recwarn):
    """As np.asarray makes it of JAX's arrays."""
    mine("def score(history, item):\n    found = item.cpu().numpy() * 0.1\n    found.flags.writeable = False\n"
         "    return found\n")
    run("--reward", "mine:score", "--out", "here")
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize("text", [
    "torch.set_default_dtype(torch.float64)\ndef score(history, item):\n    return item * 0.1\n",
    "def score(history, item):\n    torch.set_default_dtype(torch.float16)\n    return item * 0.1\n",
    "torch.set_default_device('meta')\ndef score(history, item):\n    return item * 0.1\n",
], ids=["dtype at the import", "dtype at the call", "device"])  # fmt: skip
def test_a_reward_that_changes_torchs_defaults_is_refused_and_leaves_them_as_they_were(mine, capsys, folder, text):
    """What a module does at its import holds for the first call alone, if it is undone; else for the policy as well."""
    mine(f"import torch\n{text}")
    line = refused(capsys, "--reward", "mine:score", "--out", "here")
    assert "changes torch's default dtype or device" in line and not (folder / "here").exists()
    assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float32, "cpu")


def test_a_reward_that_changes_the_folder_does_not_take_the_run_with_it(mine, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    mine(f"import os\ndef score(history, item):\n    os.chdir({str(elsewhere)!r})\n    return item * 0.1\n")
    run("--reward", "mine:score", "--out", "here")
    assert (folder / "here" / "report.md").exists() and not list(elsewhere.iterdir())


def test_the_names_of_parts_are_those_of_the_first_call_in_one_order(mine):
    """Each process asks about its own rows, and they gather one part after the other."""
    mine("calls = []\ndef score(history, item):\n    calls.append(0)\n"
         "    parts = [('a', item * 0.5), ('b', item * 0.25)]\n    return dict(parts[:: -1 if len(calls) % 2 else 1])\n"
         "def fewer(history, item):\n    return {'a': item * 0.5, **({'b': item} if (item > 3).any() else {})}\n")
    reward, item = own_reward("mine:score"), torch.tensor([[1, 2]])
    assert [*reward(torch.zeros(1, 2), item)] == [*reward(torch.zeros(1, 2), item)] == ["a", "b"]
    reward = own_reward("mine:fewer")
    reward(torch.zeros(1, 2), item)
    with pytest.raises(nano.UserError, match=r"parts \['a', 'b'\] instead of \['a'\]"):
        reward(torch.zeros(1, 2), item + 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_reward_that_catches_everything_does_not_catch_a_signal(mine, folder, capsys, number):
    """`except:` catches KeyboardInterrupt too: the run ends before the next update."""
    mine("import os\ncalls = []\ndef score(history, item):\n"
         "    try:\n        calls.append(0)\n        if len(calls) == 4:\n"
         f"            os.kill(os.getpid(), {int(number)})\n"
         "    except:\n        pass\n"
         "    return item * 0.1\n")
    with pytest.raises(SystemExit) as end:
        run("--reward", "mine:score", "--rl-steps", "9", "--out", "here")
    assert end.value.code == 128 + number and "with --resume here" in capsys.readouterr().err
    assert len(sys.modules["mine"].calls) == 4
    nano.main(["--resume", "here"])
    assert (folder / "here" / "report.md").exists()


FAULTS = {
    "it raises": ("def score(history, item):\n    return item / len([])[0]\n", ["TypeError", "mine.py, line 3"]),
    "its helper raises": ("def help():\n    raise KeyError('price')\ndef score(history, item):\n    return help()\n",
                          ["KeyError", "mine.py, line 5", "price"]),
    "it exits": ("import sys\ndef score(history, item):\n    sys.exit('no licence')\n",
                 ["SystemExit", "mine.py, line 4", "no licence"]),
    "a message that fails": ("class Odd(Exception):\n    def __str__(self):\n        raise KeyError('no')\n"
                             "def score(history, item):\n    raise Odd\n", ["Odd", "line 6"]),
    "a cancelled task": ("import asyncio\ndef score(history, item):\n    raise asyncio.CancelledError('late')\n",
                         ["CancelledError", "mine.py, line 4", "late"]),
    "a message about slots": ("def score(history, item):\n    raise ValueError('cannot allocate 5 slots')\n",
                              ["ValueError", "mine.py, line 3", "cannot allocate 5 slots"]),
    "a message of two lines": ("def score(history, item):\n    raise ValueError('one\\ntwo')\n", ["one", "line 3"]),
    "shape": ("def score(history, item):\n    return item.sum(1)\n", ["[(2,)] instead of (2, 3)"]),
    "a shape of one row": ("def score(history, item):\n    return item[0] * 1.0\n", ["[(3,)] instead of (2, 3)"]),
    "a shape of columns": ("def score(history, item):\n    return item.T * 1.0\n", ["[(3, 2)] instead of (2, 3)"]),
    "one score for each prompt": ("def score(history, item):\n    return history[:, -1:] * 1.0\n", ["(2, 1)"]),
    "a table that does not know -1": (
        "price = {i: .1 for i in range(999)}\ndef score(history, item):\n"
        "    return [[price[x] for x in row] for row in item.tolist()]\n", ["KeyError in", "mine.py, line 4: -1;"]),
    "more than float32 holds": ("def score(history, item):\n    return item.double() * 0 + 1e300\n",
                                ["not finite, or beyond float32"]),
    "names of several kinds": ("def score(history, item):\n    return {'a': item, 1: item}\n", ["TypeError"]),
    "the shape of a part": ("def score(history, item):\n    return {'a': item * 0.5, 'b': item.sum(1)}\n", ["(2,)"]),
    "complex numbers": ("def score(history, item):\n    return item * 1j\n", ["TypeError", "complex"]),
    "complex numbers of NumPy": ("def score(history, item):\n    return item.numpy() * 1j\n", ["TypeError", "complex"]),
    "times, one of which is missing": (
        "import numpy as np\ndef score(history, item):\n    return np.where(item > 3, np.timedelta64('NaT'), item)\n",
        ["TypeError", "a time"]),
    "dates": ("import numpy as np\ndef score(history, item):\n    return item.numpy().astype('M8[D]')\n", ["a time"]),
    "dates in lists": ("import numpy as np\ndef score(history, item):\n"
                       "    return [[np.datetime64('2026-11-28') for x in row] for row in item]\n", ["a time"]),
    "what is behind a mask": ("import numpy as np\ndef score(history, item):\n"
                              "    return np.ma.masked_array(item, item > 3, float)\n", ["TypeError", "masked"]),
    "None": ("def score(history, item):\n    pass\n", ["shape [()] instead of (2, 3)"]),
    "nothing": ("def score(history, item):\n    return {}\n", ["dict"]),
    "text": ("def score(history, item):\n    return 'high'\n", ["str"]),
    "a list of texts": ("def score(history, item):\n    return [['high']] * len(item)\n", ["str"]),
    "a list with None": ("def score(history, item):\n    return [[None]] * len(item)\n", ["shape [(2, 1)]"]),
    "a list with None, in shape": ("def score(history, item):\n    return [[None] * len(row) for row in item]\n",
                                   ["not finite"]),
    "rows of unequal length": ("def score(history, item):\n    return [[1.0], [1.0, 2.0]]\n", ["inhomogeneous"]),
    "arrays of unequal length": ("import torch\ndef score(history, item):\n    return [torch.ones(1), torch.ones(2)]\n",
                                 ["equal size"]),
    "one argument": ("def score(item):\n    return item * 1.0\n", ["TypeError", "score() takes 1 positional"]),
    "no function": ("def other(history, item):\n    return item\n", ["AttributeError", "score"]),
    "not a function": ("score = 3\n", ["TypeError", "not callable"]),
    "an import that fails": ("import no_such_library\n", ["mine.py, line 2", "no_such_library"]),
    "syntax": ("def score(history item):\n    return item\n", ["SyntaxError", "mine.py, line 2"]),
    "a module that raises": ("price = open('prices.csv')\n", ["FileNotFoundError", "mine.py, line 2", "prices.csv"]),
    "a module that exits": ("import sys\nsys.exit()\n", ["SystemExit", "mine.py, line 3"]),
}


@pytest.mark.parametrize("text, words", FAULTS.values(), ids=FAULTS)
def test_a_reward_that_cannot_be_used_is_named_in_one_line_before_anything_is_trained(mine, capsys, text, words):
    mine(text)
    line = refused(capsys, "--reward", "mine:score", "--out", "here")
    assert line.startswith("--reward mine:score: ") and line.endswith("(docs/models.md)")
    assert all(word in line for word in words), line


def test_an_async_reward_is_refused_in_one_line_and_python_adds_none(mine, folder):
    """A coroutine that nobody awaits would warn when it is collected."""
    mine("async def score(history, item):\n    return item\n")
    argv = ["--data", "shop", "--reward", "mine:score", "--out", "here", "--device", "cpu"]
    done = subprocess.run([sys.executable, nano.__file__, *argv], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "coroutine" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["mine", ":score", "mine:", "no.such:score", "mine:score:twice"])
def test_a_reward_that_does_not_exist_is_named_in_one_line(mine, capsys, name):
    mine("def score(history, item):\n    return item\n")
    assert refused(capsys, "--reward", name, "--out", "here").startswith(f"--reward {name}: ")


LATE = {
    "nan": ("return item * float('nan')", "--reward mine:score: ValueError: a score is not finite, "),
    "inf": ("return item / 0", "--reward mine:score: ValueError: a score is not finite, "),
    "one item": ("return torch.where(item == 3, float('nan'), 1.0)", "--reward mine:score: ValueError: a score is "),
    "sums too large": ("return dict.fromkeys('ab', item * 0 + 3e38)", "--reward mine:score: ValueError: a score is "),
    "opposite": ("return dict(a=item * 0 + 4e38, b=item * 0 - 4e38)", "--reward mine:score: ValueError: a score is "),
    "shape": ("return item[:, :3] * 1.0", "--reward mine:score: "),
}


@pytest.mark.parametrize("text, start", LATE.values(), ids=LATE)
def test_what_shows_in_training_alone_is_one_line_too(mine, capsys, folder, text, start):
    mine(f"def score(history, item):\n    {text}\n")
    assert refused(capsys, "--reward", "mine:score", "--rl-steps", "4", "--out", "here").startswith(start)
    assert not (folder / "here" / "report.md").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_a_reward_forks_ends_by_a_signal_as_any_other(mine, folder, capfd):
    """multiprocessing.Pool ends its own so: they would say that the run has stopped, or never end."""
    mine("import os, signal, time\n\ndef score(history, item):\n"
         "    for number in (signal.SIGTERM, signal.SIGINT):\n"
         "        child = os.fork()\n"
         "        if not child:\n"
         "            time.sleep(60)\n"
         "            os._exit(0)\n"
         "        time.sleep(0.02)\n"
         "        os.kill(child, number)\n"
         "        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number\n"
         "    return item * 0.1\n")
    run("--reward", "mine:score", "--rl-steps", "2", "--out", "here")
    assert (folder / "here" / "report.md").exists() and "stopped" not in capfd.readouterr().err


@pytest.mark.parametrize("text", [
    "import torch\ntorch.set_grad_enabled(False)\ndef score(history, item):\n    return item * 0.1\n",
    "import torch\ndef score(history, item):\n    torch.set_grad_enabled(False)\n    return item * 0.1\n",
    "import torch\ntorch.set_grad_enabled(True)\ndef score(history, item):\n    return item * torch.ones((), "
    "requires_grad=True) * 0.1\n"], ids=["module", "function", "with gradient"])
def test_a_reward_may_turn_gradients_off_and_on(mine, folder, text):
    mine("def score(history, item):\n    return item * 0.1\n")
    run("--reward", "mine:score", "--rl-steps", "2", "--out", "plain")
    mine(text)
    run("--reward", "mine:score", "--rl-steps", "2", "--out", "here")
    assert logged(folder / "here") == logged(folder / "plain")


def test_a_run_that_its_own_reward_has_stopped_goes_on_with_a_mended_one(mine, capsys, folder):
    mine("calls = []\ndef score(history, item):\n    calls.append(item)\n"
         "    return item * 0.1 if len(calls) < 6 else price[item]\n")
    options = ["--reward", "mine:score", "--rl-steps", "5", "--save-every", "1"]
    line = refused(capsys, *options, "--out", "here")
    assert "NameError" in line and line.endswith("; the run so far: --resume here")
    mine("def score(history, item):\n    return item * 0.1\n")
    nano.main(["--resume", "here"])
    mine("def score(history, item):\n    return item * 0.1\n")
    run(*options, "--out", "whole")
    assert logged(folder / "here") == logged(folder / "whole")


# -- logging -----------------------------------------------------------------------------------------------------------


def test_the_lines_on_the_page_tell_a_tracker_every_number(mine, folder, monkeypatch):
    fake, told = types.ModuleType("wandb"), []
    fake.init, fake.log = lambda project: fake, told.append
    monkeypatch.setitem(sys.modules, "wandb", fake)
    mine("")
    run("--out", "here")
    page = nano.Path(nano.__file__).parent / "docs" / "models.md"
    page = page.read_text(encoding="utf-8").split("\n## Watching\n")[1]
    with (folder / "here" / "metrics.jsonl").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        exec(textwrap.dedent(re.search("((?:^    .*\n)+)", page, re.MULTILINE)[1]), {})
    rows = lines(folder / "here" / "metrics.jsonl")
    assert len(told) == len(rows) > 5
    for row, numbers in zip(rows, told, strict=True):
        name = "/".join(row[key] for key in ("phase", "method") if key in row)
        assert numbers == {f"{name}/{key}": value for key, value in row.items() if not isinstance(value, str)}


def test_every_row_says_how_long_it_took(mine, folder):
    mine("")
    began = time.perf_counter()
    run("--out", "here")
    took = [row["seconds"] for row in lines(folder / "here" / "metrics.jsonl")]
    assert min(took) >= 0 and 0 < sum(took) < time.perf_counter() - began


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


def waits_of_training(name, monkeypatch, **changes):
    """What the host waits for, in each step from the first sampled token to the end of the first update."""
    watch, inside = Waits(), []
    sample, step = nano.sample, nano.Optimizer.step

    def sampling(*points):
        select = sample(*points)

        def first(*level):
            if not inside:
                inside.append(watch.__enter__())
            return select(*level)

        return first

    def stepping(self, *where, **watched):
        found = step(self, *where, **watched)
        if inside:
            inside.pop().__exit__(None, None, None)
        return found

    ranker = nano.train_ranker(CATALOGUE, nano.ImpressionLog(
        PROMPTS.history, PROMPTS.target[:, None].expand(-1, 3), torch.rand(14, 3) < 0.5, None), settings(), epochs=1)
    monkeypatch.setattr(nano, "sample", sampling)
    monkeypatch.setattr(nano.Optimizer, "step", stepping)
    for method in ("tolist", "cpu", "numpy", "item", "__array__"):
        real = getattr(torch.Tensor, method)

        def noted(self, *arguments, real=real, method=method, **options):
            if inside:
                watch.seen.append(method)
            return real(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, method, noted)
    c = cfg(rl_steps=2, **changes)
    train(name, c, reward=nano.make_reward(ranker, c))
    return watch.seen


@pytest.mark.parametrize("name", [name for name in METHODS if name != "nll"])
def test_from_rollout_to_update_the_host_waits_to_learn_who_is_admitted_and_whether_all_is_finite(name, monkeypatch):
    assert waits_of_training(name, monkeypatch) == ["aten.nonzero.default", "tolist"] * 2, "in each of two steps"


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
    assert len(waits_of_training("adagrpo", monkeypatch)) > 4
