# SPDX-License-Identifier: MIT
"""docs/figures/: the arithmetic of make.py is that of the gate, and one command writes figures and tables."""

import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import adagrpo_core as core
import nanoadagrpo as nano

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "figures"), str(ROOT / "docs" / "evidence")]
FAQ = (ROOT / "docs/faq.md").read_text(encoding="utf-8")

import dynamics  # noqa: E402
import make  # noqa: E402
import probe  # noqa: E402
from probe import Gate  # noqa: E402

THIRD, TENTH = Fraction(1, 3), Fraction(1, 10)


def at_random(gate, invalid=0, n=40_000):
    """R of n prompts under a ranker that knows nothing; the first rollouts are at the floor."""
    g = np.random.default_rng(1)
    target, rewards, negatives = 1 + g.random(n), 1 + g.random((n, gate.K)), 1 + g.random((n, gate.M))
    rewards[:, :invalid] = 0.0
    return core.reliability(target, rewards, negatives, tau=float(gate.tau), rho=float(gate.rho))


HALF = Fraction(1, 2)


@pytest.mark.parametrize("gate, invalid", [
    (Gate(THIRD, TENTH, 1, 32), 0), (Gate(THIRD, TENTH, 1, 32), 3), (Gate(THIRD, HALF, 2, 8), 0),
    (Gate(THIRD, HALF, 4, 16), 2), (Gate(Fraction(4, 5), Fraction(9, 10), 3, 10), 1)])
def test_the_chance_of_a_ranker_that_knows_nothing_is_what_a_simulation_finds(gate, invalid):
    exact = float(probe.null(gate, invalid))
    assert abs(at_random(gate, invalid).mean() - exact) < 4 * (exact * (1 - exact) / 40_000) ** 0.5 + 1e-9


def test_the_page_computes_the_same_chance():
    names = {}
    exec(re.search(r"```python\n(.*?)\nfor setting", FAQ, re.S)[1], names)
    for gate in (Gate(THIRD, TENTH, 1, 32), Gate(Fraction(1, 5), Fraction(1, 2), 4, 32), Gate(THIRD, TENTH, 8, 64)):
        assert names["null"](*gate) == pytest.approx(float(probe.null(gate)))


@pytest.mark.parametrize("K, M, rho", [(32, 1, TENTH), (32, 3, TENTH), (10, 2, Fraction(3, 10)), (64, 1, HALF)])
def test_the_gate_is_shut_by_one_invalid_rollout_more_than_the_pages_bound(K, M, rho):
    bound = K + 1 - int((1 - rho) * K)
    for invalid, opens in ((bound, True), (bound + 1, False)):
        rewards = np.linspace(1, 2, K)[None]
        rewards = np.where(np.arange(K) < invalid, 0.0, rewards)
        knows = core.reliability(np.array([3.0]), rewards, np.linspace(0.1, 0.5, M)[None], rho=float(rho))
        assert knows[0] == opens
        assert (probe.null(Gate(THIRD, rho, M, K), invalid) > 0) == opens


def test_answers_of_the_self_test_that_are_numbers():
    pool = np.log(np.array([[0.4, 0.4, 0.4, 0.2, 0.1, 0.1]]))
    assert not core.difficulty(np.log([0.4]), pool)[0] and core.policy_rank(np.log([0.4]), pool, ties="max")[0] == 4
    assert probe.null(Gate(THIRD, TENTH, 1, 32)) == Fraction(10, 34) * Fraction(6, 33)
    ten = np.where(np.arange(32) < 10, 0.0, np.linspace(1, 2, 32))[None]
    for negative in (0.5, 0.0):
        assert core.reward_ranks(np.array([3.0]), ten, np.array([[negative]])).negatives[0, 0] == 24
    five = np.where(np.arange(32) < 5, 0.0, np.linspace(1, 2, 32))[None]
    assert core.reliability(np.array([3.0]), five, np.array([[0.0]]))[0]
    same = np.full((1, 32), 0.7)
    assert not core.reliability(same[:, 0], same, same[:, :1])[0] and not core.group_advantages(same).any()
    assert core.adagrpo_loss(*(np.log(np.full(shape, 0.5)) for shape in ((1, 1), (1, 32, 1), (1, 32, 1))), ten,
                             np.array([3.0]), np.array([[0.5]])).clip.tolist() == [False]


def test_the_test_has_as_many_answers_as_questions():
    questions, answers = FAQ.split("## Test yourself")[1].split("### Answers")
    for part in (questions, answers):
        assert re.findall(r"^(\d+)\. ", part, flags=re.M) == [str(n) for n in range(1, 16)]


def test_the_trees_tokens_are_counted_as_the_walkthrough_says():
    for items, K in ((2, 4), (6, 32)):
        T, L = 3 * items + 1, 3
        assert make.counted(items, K) == {"repeated": K * (T + L), "tree": T + K * (L - 1)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "lambdas", lambda cfg: [cfg.lam])
        patch.setattr(nano, "progress", nano.progress)  # put back what make replaces
        return out, make.main(["--size", "small", "--seeds", "0", "--out", str(out)])


def test_one_command_writes_every_figure_and_every_table(made):
    out, _ = made
    assert {path.stem for path in (out / "figures").glob("*.png")} == {"gate", "plane", "tree", "sensitivity"}
    page = (out / "faq.md").read_text(encoding="utf-8")
    for name in ("knobs", "invalid", "lambda", "provenance"):
        assert len(re.findall(rf"<!-- {name}: [^>]*-->\n(.+?)\n<!-- /{name} -->", page, flags=re.S)) == 1
    outside = re.compile(r"<!-- (\w+): [^>]*-->\n.*?<!-- /\1 -->", re.S)
    assert outside.sub("", page) == outside.sub("", FAQ)


def test_what_was_computed_is_kept(made, monkeypatch):
    out, (passes, numbers) = made
    monkeypatch.setattr(probe.measure, "prepare", None)  # nothing is trained a second time
    [folder] = out.glob("*/seed-0")
    rows, found = probe.one_seed(nano.Settings(toy=True), nano.World(), folder)
    assert found == numbers[0] and np.array_equal(rows.rewards, passes[0].rewards)


def test_a_cell_is_the_mean_and_the_range_over_seeds():
    assert make.number([0.1, 0.3, float("nan")]) == "20.0 (10.0 to 30.0)"
    assert make.number([0.25], 1, 2) == "0.25" and make.number([float("nan")]) == ""


def test_the_gate_of_a_pass_is_the_cores_and_a_stricter_one_admits_fewer(made):
    _, (passes, _) = made
    default = make.default_gate(nano.Settings(toy=True, group_size=12))
    rows = passes[0]
    assert rows.rewards.shape == (len(rows.misled), probe.ROLLOUTS)
    assert (np.isnan(rows.agreement) | (abs(rows.agreement) <= 1 + 1e-9)).all()
    shares = [probe.coverage(rows, default._replace(rho=Fraction(9, 10), M=M))["reliable"] for M in (1, 2, 4)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0
    assert sum(row[0] for row in probe.by_invalid(rows, default)) == pytest.approx(1)


def test_agreement_is_spearmans_correlation_of_the_items_alone():
    rewards, utility = np.array([[1.0, 2.0, 3.0, 9.0], [1.0, 1.0, 1.0, 1.0]]), np.array([[3.0, 5.0, 9.0, 0.0]] * 2)
    valid = np.array([[True, True, True, False], [True] * 4])
    found = probe.measure.spearman(rewards, utility, valid)
    assert found[0] == pytest.approx(1) and np.isnan(found[1])


def test_a_page_without_a_place_is_refused_by_name():
    with pytest.raises(nano.UserError, match="knobs"):
        make.placed("nothing here", {"knobs": "x"})


def test_the_dynamics_of_a_run_are_drawn_from_what_it_logged(tmp_path, capsys):
    rows = [dict(phase="test", method="base", step=0)]
    for method, admitted in (("nll", {}), ("adagrpo", {"admitted": 0.25})):
        rows += [{"phase": "valid", "method": method, "step": step, "hr@10": step / 10, "hallucination": 0.5}
                 for step in (0, 4)]
        rows += [dict(phase="rl", method=method, step=step, **admitted) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dynamics.main([str(tmp_path)])
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{tmp_path / 'dynamics.png'}\n"
    curves = dynamics.curves(rows)
    assert list(curves) == list(dynamics.PANELS) and all(list(lines) == ["nll", "adagrpo"] for lines in curves.values())
    assert curves["validation HR@10 (%)"]["nll"] == ([0, 4], [0, 40])
    assert curves["admitted (%)"] == {"nll": ([], []), "adagrpo": ([1, 2, 3, 4], [25] * 4)}
    assert curves["validation hallucination (%)"]["adagrpo"] == ([0, 4], [50, 50])
    with pytest.raises(SystemExit) as end:
        dynamics.main([str(tmp_path / "none")])
    assert end.value.code == 2
    assert "metrics.jsonl: No such file or directory; name one folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"", b'{"loss": 1}\n', b"3\n", b'{"phase": "rl", "st', b"\xff\x00",
                                  b'{"phase": "sft", "step": 1}\n', b'{"phase": "rl", "step": 1}\n'])
def test_a_log_that_cannot_be_drawn_is_refused(tmp_path, capsys, text):
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with pytest.raises(SystemExit) as end:
        dynamics.main([str(tmp_path)])
    assert end.value.code == 2 and str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_figure_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"phase": "rl", "method": "nll", "step": 1, "admitted": 0.5}))
    (tmp_path / "dynamics.png").mkdir()
    with pytest.raises(SystemExit) as end:
        dynamics.main([str(tmp_path)])
    assert end.value.code == 2 and "dynamics.png" in capsys.readouterr().err
