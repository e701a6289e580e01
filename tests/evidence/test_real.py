# SPDX-License-Identifier: MIT
"""Real feedback, on made-up ratings in the same format: who learns from what, the controls, the judges, the whole."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import real
import real_data
import real_report
import report
import scipy.stats
import torch

import nanoadagrpo as nano

from .conftest import interrupted_at

CFG = dataclasses.replace(real.SIZES["small"], beam_width=12)


def ratings_in(folder, seed=5, users=60, items=40):
    """Two tastes, two kinds of songs; half of the users were also given ten songs at random."""
    g, chosen, random = np.random.default_rng(seed), [], []
    for user in range(users):
        order = g.permutation(items)
        n = g.integers(3, 20)
        good = g.random(items) < np.where(order % 2 == user % 2, 0.8, 0.2)
        chosen += [(user, item, g.integers(4, 6) if y else g.integers(1, 4))
                   for item, y in zip(order[:n], good, strict=False)]
        random += [(user, item, 4 if y else 2) for item, y in zip(order[n : n + 10], good[n:], strict=False)
                   if user < users // 2]
    folder.mkdir(exist_ok=True)
    for name, rows in (("user.txt", chosen), ("random.txt", random)):
        np.savetxt(folder / name, rows, "%d", ",")
    return folder


@pytest.fixture(scope="module")
def yahoo(tmp_path_factory):
    return ratings_in(tmp_path_factory.mktemp("yahoo"))


@pytest.fixture(scope="module")
def ratings(yahoo):
    return real_data.read(yahoo)


# -- who learns from what ----------------------------------------------------------------------------------------------


def test_the_last_three_of_five_likes_are_held_out_from_all_that_is_learnt_from(ratings):
    data, H = real_data.split(ratings, 0), 4
    rows = real_data.prompts(data, H)
    logs = real_data.rated_log(data, H, np.random.default_rng(0)), real_data.uniform_log(
        rows["train"], ratings.items, np.random.default_rng(0))
    likes = {user: {i for u, i, r in ratings.chosen.tolist() if u == user and r >= 4} for user in range(60)}
    assert data.held.keys() == {user for user in likes if len(likes[user]) >= 5} and len(data.held) > 20
    for user, held in data.held.items():
        assert len({*held}) == 3 and {*held} | {*data.likes[user]} == likes[user] and not {*held} & {*data.likes[user]}
        learnt = [x for u, history, target in rows["train"] if u == user for x in (*history, target)]
        learnt += [x for u, history, shown, _ in logs[0] if u == user for x in (*history, *shown)]
        learnt += [x for u, history, shown, click in logs[1] if u == user
                   for x in (*history, *(item for item, y in zip(shown, click, strict=True) if y))]
        learnt += [item for item, _ in data.rated[user]]
        assert learnt and not {*held} & {*learnt}
        (rl,), (valid,), (test,) = ([row[1:] for row in rows[name] if row[0] == user]
                                    for name in ("rl", "valid", "test"))
        assert (rl[1], valid[1], test[1]) == held
        life = data.likes[user] + [*held]
        assert [rl[0], valid[0], test[0]] == [life[:-i][-H:] for i in (3, 2, 1)]


def test_a_shown_item_stands_in_no_history_of_its_row(ratings):
    data = real_data.split(ratings, 0)
    log = real_data.rated_log(data, 10, np.random.default_rng(0))
    assert all(not {*history} & {*shown} and len(shown) <= real_data.ROWS for _, history, shown, _ in log)
    for user, mine in data.rated.items():  # each rated item is shown once, and clicked if it was liked
        shown = [pair for u, _, items, click in log if u == user for pair in zip(items, click, strict=True)]
        assert sorted(shown) == sorted((item, int(rating >= 4)) for item, rating in mine)


def test_neither_held_out_likes_nor_random_ratings_reach_a_file_of_learning(ratings, tmp_path):
    """Their values are changed, and the Semantic IDs and all that is learnt from stay as they were."""
    def learnt(folder, given, data):
        real_data.write(data, given.items, folder, CFG)
        files = ["catalogue.json", "train.jsonl", "rated/log.jsonl", "uniform/log.jsonl"]
        return [(folder / name).read_text() for name in files], (folder / "test.jsonl").read_text()

    data = real_data.split(ratings, 0)
    other = ratings._replace(random=1 - ratings.random % 2)
    changed = real_data.split(other, 0)
    changed = changed._replace(held={user: (x, z, y) for user, (x, y, z) in changed.held.items()})
    (before, test), (after, other_test) = learnt(tmp_path / "a", ratings, data), learnt(tmp_path / "b", other, changed)
    assert before == after and test != other_test


def test_the_script_reads_the_files_as_they_were_meant(ratings, tmp_path):
    data = real_data.split(ratings, 0)
    real_data.write(data, ratings.items, tmp_path, CFG)
    rows = real_data.prompts(data, CFG.max_history)
    found = nano.load_data(tmp_path, CFG)
    assert found.catalogue.N == ratings.items == 40
    for name, prompts in (("train", found.sft), ("valid", found.valid), ("test", found.test)):
        assert prompts.target.tolist() == [target for *_, target in rows[name]], name  # rows are items' numbers
        assert [[x for x in past if x >= 0] for past in prompts.history.tolist()] == [row[1] for row in rows[name]]
    assert found.rl.target[found.rl.user.argsort()].tolist() == [target for *_, target in rows["rl"]]
    assert "15 items at random" in found.source
    for name in ("rated", "uniform"):
        logged = nano.load_data(tmp_path / name, CFG)
        assert "log.jsonl" in logged.source and logged.log.click.any() and logged.holdout


# -- controls and judges -----------------------------------------------------------------------------------------------


def test_controls_admit_as_many_as_R_and_others_than_R():
    generator, differ = torch.Generator().manual_seed(0), 0
    for n in range(17):
        reliable = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.randperm(16, generator=generator)[:n], True)
        at_random, against = (method.admit(None, reliable, None, generator) for method in real.CONTROLS.values())
        assert at_random.sum() == against.sum() == n
        assert (against & reliable).sum() == max(0, 2 * n - 16)
        differ += bool((at_random != reliable).any())
    assert differ > 8


def test_judges_are_what_plain_loops_say():
    g = np.random.default_rng(0)
    liked, score = g.random((50, 10)) < 0.4, g.integers(6, size=(50, 10)).astype(float)  # with ties
    liked[:, 0], liked[:, 1] = True, False
    item, served = (np.array([g.permutation(60)[:n] for _ in range(50)]) for n in (10, 50))
    served[3, 5:] = -1
    table = real.per_user(score, item, liked, served, served[:, 9].copy(), np.exp(-score))
    x = dict(zip(real_report.PER_USER, table.T, strict=True))
    for i in range(50):
        pairs = [(a, b) for a, y in zip(score[i], liked[i], strict=True) if y
                 for b, z in zip(score[i], liked[i], strict=True) if not z]
        assert x["auc"][i] == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))
        order = sorted(range(10), key=lambda j, i=i: (-score[i, j], j))
        gains = [sum(y / np.log2(j + 2) for j, y in enumerate(ys[:5]))
                 for ys in (liked[i, order], sorted(liked[i], reverse=True))]
        assert x["ndcg@5"][i] == pytest.approx(gains[0] / gains[1])
        for k in (10, 50):
            among = [y for j, y in zip(item[i], liked[i], strict=True) if j in served[i, :k]]
            assert (x[f"random@{k}"][i], x[f"liked@{k}"][i]) == (len(among), sum(among))
    assert x["hr@10"].tolist() == [1.0] * 50  # of the row that ends early, -1 is its target too
    assert x["liked mass"] == pytest.approx((np.exp(-score) * liked).sum(1), rel=1e-5)
    assert real.entropy(np.array([3, 3, 4, 5])) == pytest.approx(1.5)


@pytest.mark.parametrize("power", [1, 3])
def test_the_mass_of_an_item_is_the_share_of_samples_of_the_policy_or_of_its_third_power(power):
    catalogue = nano.Catalogue([(a, b) for a in range(3) for b in range(2)])
    judged = nano.Prompts(torch.tensor([[0, 5], [2, 3]]), torch.tensor([1, 4]), torch.arange(2))
    policy, item = nano.tiny_policy(catalogue, CFG), torch.tensor([[0, 2, 3], [5, 1, 0]])
    liked, words = np.array([[True, False, True]] * 2), catalogue.S + 1
    cfg = dataclasses.replace(CFG, beam_width=words**2)  # all that can be said
    setup = SimpleNamespace(policy=policy, judged=judged, cfg=cfg, item=item, liked=liked)
    _, table = real.judge(setup, nano.Ranker(catalogue, heads=1), power)
    said = torch.cartesian_prod(torch.arange(words), torch.arange(words)).expand(2, -1, -1)
    with torch.no_grad():
        p = nano.sequence_logp(policy, nano.prefill(policy, judged.history), said).sum(-1).exp().numpy() ** power
    share = p / p.sum(1, keepdims=True)
    own = [[int(words * a + b) for a, b in catalogue.tokens[row].tolist()] for row in item]
    mass = np.take_along_axis(share, np.array(own), 1)
    assert table[:, -1] == pytest.approx(mass.sum(1), rel=1e-4)
    assert table[:, -2] == pytest.approx((mass * liked).sum(1), rel=1e-4)


def test_ease_is_the_best_ridge_without_the_item_itself():
    likes = {0: [0, 1], 1: [0, 1, 2], 2: [2, 3], 3: [0, 3]}
    B, X = real.ease(likes, 4, ridge=0.5), np.zeros((4, 4))
    for user, mine in likes.items():
        X[user, mine] = 1
    for j in range(4):
        others = [i for i in range(4) if i != j]
        A = X[:, others]
        assert B[others, j] == pytest.approx(np.linalg.solve(A.T @ A + 0.5 * np.eye(3), A.T @ X[:, j])) and B[j, j] == 0


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_an_interval_of_one_seed_is_that_of_its_users():
    x = np.random.default_rng(0).normal(3, 2, (1, 400))
    mean, low, high = real_report.interval(x)
    assert mean == pytest.approx(x.mean())
    assert high - mean == mean - low == pytest.approx(1.96 * x.std() / 20, rel=1e-3)


def test_more_seeds_of_the_same_users_do_not_narrow_what_users_leave_open():
    users = np.random.default_rng(0).normal(size=(1, 400))
    one, ten = real_report.interval(users), real_report.interval(users.repeat(10, 0))
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=1e-3)


def test_what_all_users_of_a_seed_share_is_an_interval_over_seeds():
    seeds = np.random.default_rng(0).normal(size=(6, 1))
    expected = scipy.stats.t.ppf(0.975, 5) * seeds.std(ddof=1) / 6**0.5
    found = real_report.interval(seeds.repeat(300, 1))
    assert found.high - found.mean == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("seeds, users", [(3, 150), (10, 150)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(seeds, users):
    g = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        x = g.normal(size=(1, users)) + g.normal(size=(seeds, 1)) / 12 + g.normal(size=(seeds, users))
        found = real_report.interval(x)
        held += found.low < 0 < found.high
    assert 0.88 < held / 400 < 0.99


def test_ratios_and_contrasts_have_the_plain_mean_and_the_spread_of_draws_of_users():
    g = np.random.default_rng(2)
    n = g.integers(0, 4, (1, 300)).astype(float)
    y = g.binomial(n.astype(int), 0.3).astype(float)
    x, where = g.normal(size=(1, 300)), g.random((1, 300)) < 0.2
    plain = {"ratio": lambda i: y[0, i].sum() / n[0, i].sum(),
             "contrast": lambda i: x[0, i][where[0, i]].mean() - x[0, i][~where[0, i]].mean()}
    for name, values in (("ratio", real_report.ratio(y, n)), ("contrast", real_report.contrast(x, where))):
        found = real_report.interval(values)
        drawn = [plain[name](g.integers(300, size=300)) for _ in range(2000)]
        assert found.mean == pytest.approx(plain[name](np.arange(300)))
        assert (found.high - found.low) / 3.92 == pytest.approx(np.std(drawn), rel=0.1)
    assert np.isnan(real_report.contrast(x, where & False)).all()


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(yahoo, tmp_path_factory):
    """Doses chosen on seed 2; then seed 100, interrupted and resumed."""
    out = tmp_path_factory.mktemp("real")
    common = ["--yahoo", str(yahoo), "--size", "small", "--jobs", "0", "--out", str(out)]
    common += ["--dose", str(out / "dose.json")]
    page, (start, end) = out / "page.md", report.marks("real")
    for path in (page, out / "page-tables.md"):
        path.write_text(f"before\n{start}old\n{end}\nafter\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(real.SIZES, "small", CFG)
        patch.setattr(real, "RATES", (1e-3,))
        patch.setattr(real, "LAMBDAS", (5.0,))
        doses = real.main(["--tune", "--seeds", "2", *common])
        whole = interrupted_at(patch, real, 3)
        with pytest.raises(KeyboardInterrupt):
            real.main(["--seeds", "100", "--page", str(page), *common])
        before = {path: path.stat().st_mtime_ns for path in (out / "seed-100").glob("*.json")}
        patch.setattr(real, "run_arm", whole)
        results = real.main(["--seeds", "100", "--page", str(page), *common])
    return out, before, results, doses


def test_what_was_finished_is_not_computed_again(finished):
    out, before, results, _ = finished
    assert {path.stem for path in before} == {"curve", "base", *(arm.label for arm in [*results.arms][:2])}
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert not list(out.glob("**/*.part*")) and "random-r" not in nano.METHODS


def test_tuning_judges_by_validation_alone(finished):
    out, _, _, doses = finished
    units = [json.loads(path.read_text()) for path in (out / "tune" / "seed-2").glob("*_*.json")]
    assert len(units) == 5 and not any("final" in unit for unit in units) and not list(out.glob("tune/seed-2/*_*.npz"))
    assert doses["lr"] == 1e-3 and doses["rated"] == {"grpo+nll": 5.0, "adagrpo": 5.0}


def test_units_and_doses_of_other_ratings_are_refused(finished, tmp_path, capsys):
    """One rating has changed: what was chosen and what was trained are of no use to it."""
    out, *_ = finished
    other = ratings_in(tmp_path / "other")
    lines = (other / "user.txt").read_text().splitlines()
    user, item, rating = lines[0].split(",")
    (other / "user.txt").write_text("\n".join([f"{user},{item},{6 - int(rating) or 1}", *lines[1:]]) + "\n")
    common = ["--yahoo", str(other), "--size", "small", "--seeds", "100", "--dose", str(out / "dose.json"), "--out"]
    for folder, message in ((out, "holds units of other ratings"), (tmp_path / "new", "was chosen for other")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setitem(real.SIZES, "small", CFG)
            real.main([*common, str(folder)])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def test_what_is_served_and_validated_holds_no_item_of_the_history():
    """The policy would say an item of the history first; it is passed over, as yardsticks do, and W are left."""
    catalogue = nano.Catalogue([(a, b) for a in range(4) for b in range(4)])
    cfg = dataclasses.replace(CFG, beam_width=5, max_history=3, eval_batch_size=7, constrained=True)
    g = torch.Generator().manual_seed(0)
    history = torch.rand(20, 16, generator=g).argsort(1)[:, :4]
    prompts = nano.Prompts(history[:, :3].clone(), history[:, 3].clone(), torch.arange(20))
    prompts.history[3, :2] = -1
    policy, ranker = nano.tiny_policy(catalogue, cfg), nano.Ranker(catalogue, heads=1)
    served, _ = real.serve(policy, ranker, prompts, cfg)
    _, wide = nano.evaluate(policy, ranker, prompts, dataclasses.replace(cfg, beam_width=8))
    passed, hits = 0, []
    for past, items, found, target in zip(prompts.history.tolist(), wide["item"].tolist(), served.tolist(),
                                          prompts.target.tolist(), strict=True):
        expected = [item for item in items if item >= 0 and item not in past][:5]
        assert found == expected + [-1] * (5 - len(expected))
        passed += bool({*past} & {*items})
        hits.append(target in expected)
    assert passed > 5 and 0 < sum(hits) < 20
    assert real.validate(policy, ranker, prompts, cfg) == pytest.approx(np.mean(hits))


def test_gates_of_one_rate_admit_equally_many(finished):
    """After one step the policies differ, and so may R; within a batch the number is equal, as tried above."""
    _, _, results, _ = finished
    for arm, (unit,) in results.arms.items():
        if arm.name in ("adagrpo-r", "random-r", "anti-r"):
            assert unit["admitted"] == unit["reliable"]
        if arm.name == "grpo+nll":
            assert unit["admitted"] == 1


def test_the_pages_have_a_row_for_each_arm_and_difference_and_keep_what_stands_around(finished):
    out, _, results, _ = finished
    page, tables = texts = [(out / name).read_text() for name in ("page.md", "page-tables.md")]
    for text in texts:
        assert text.startswith("before\n") and text.endswith("after\n") and "old\n" not in text
        assert "nan" not in text.lower().replace("nanoadagrpo", "") and str(out) not in text
        for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
            assert len({line.count(" | ") for line in block.splitlines()}) == 1
    for arm in results.arms:
        assert re.search(rf"^\| {arm.reward} *\| {re.escape(real_report.METHODS[arm.name])} ", tables, re.M), arm
    assert len(re.findall(r"^\| (?:rated|uniform) .* − ", page, re.M)) == 2 * len(real_report.PAIRS)
    said = page.partition("### What the real log says\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(said) == 7 and all(line.startswith("* **") for line in said)
    assert (out / "figures" / "real.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shift, words", [(1, "higher"), (0, "no clear difference"), (-1, "lower")])
def test_what_the_real_log_says_is_worded_by_the_intervals(finished, shift, words):
    """All arms hit half of the users; then AdaGRPO hits so much more often, or less."""
    _, _, results, _ = finished
    half = np.zeros((len(results.base[0]["arrays"]["base"]), len(real_report.PER_USER)))
    half[::2, 0] = half[:, 1] = 0.5  # HR@10, AUC
    half[:, [4, 6, 8]] = 1
    arms = {arm: [{"arrays": {"each": half + (shift * (1 + half) * (np.arange(half.shape[1]) == 0)
                                              if arm.name == "adagrpo" else 0)}}] for arm in results.arms}
    said = [*real_report.verdicts(results._replace(arms=arms))]
    for text, others in ((said[0], ("NLL continued", "GRPO+NLL")), (said[1], ("random gate",))):
        for other in others:
            assert f"against {other}: AUC no clear difference (+0.00 [+0.00, +0.00]), HR@10 {words} (" in text
    n = 2 * len(real_report.PAIRS) * len(real_report.JUDGES)
    assert f"Of the {n} intervals below {6 * (shift > 0)} lie above 0 and {6 * (shift < 0)} below" in said[4]


def test_cells_are_what_the_units_say(finished):
    _, _, results, _ = finished
    arm, other = (results.arm(name, "rated") for name in ("adagrpo", "nll"))
    each = [unit["arrays"]["each"][:, 0] for unit in (*results.arms[arm], *results.arms[other])]
    found = real_report.difference(results, arm, other)["HR@10"]
    assert found.mean == pytest.approx(100 * (each[0] - each[1]).mean())
    row = next(line for line in real_report.table_arms(results).splitlines() if "NLL continued" in line)
    assert float(row.split("|")[8]) == pytest.approx(100 * each[1].mean(), abs=0.051)


def test_the_small_size_keeps_its_doses_and_its_page_in_its_own_folder(finished, yahoo, tmp_path, monkeypatch):
    """What belongs to the repository stays as it is; so the remedy that is printed, --tune, harms nothing."""
    small, whole = (real.parse(["--yahoo", "x", "--tune", *words]) for words in (["--size", "small"], []))
    assert small.out == real.Path("runs/real/small") and whole.out == real.Path("runs/real")
    assert {small.dose.parent, small.page.parent} == {small.out}
    assert (whole.dose, whole.page) == (real.HERE / "real-dose.json", real.ROOT / "docs" / "results.md")
    assert whole.dose.is_file() and whole.page.is_file()
    theirs = [whole.dose, whole.page, report.tables_beside(whole.page), whole.page.parent / "figures" / "real.png"]
    before = {path: path.read_bytes() for path in theirs if path.exists()}
    out, _, results, _ = finished
    monkeypatch.chdir(tmp_path)
    for name, given in (("SIZES", {"small": CFG}), ("RATES", (1e-3,)), ("LAMBDAS", (5.0,))):
        monkeypatch.setattr(real, name, given)
    common = ["--yahoo", str(yahoo), "--size", "small", "--jobs", "0"]
    with pytest.raises(SystemExit):
        real.main([*common, "--seeds", "100"])  # says: run --tune first
    shutil.copytree(out / "tune", "runs/real/small/tune")  # what takes long
    shutil.copytree(out / "seed-100", "runs/real/small/seed-100")
    real.main([*common, "--tune", "--seeds", "2"])
    found = real.main([*common, "--seeds", "100"])
    assert found.arms.keys() == results.arms.keys() and (small.out / "figures" / "real.png").is_file()
    for path in (small.page, report.tables_beside(small.page)):
        assert "`docs/evidence/real.py --yahoo DIR --seeds 100 --size small`" in path.read_text()
    assert before == {path: path.read_bytes() for path in theirs if path.exists()}


@pytest.mark.parametrize("words, message", [
    ([], "--seeds"),
    (["--seeds", "100", "--dose", "none.json"], "--tune first"),
    (["--tune", "--yahoo", "nowhere"], "user.txt"),
    (["--seeds", "0,0"], "each seed once"), (["--seeds", "0", "--jobs", "-1"], "jobs are 0 or more"),
    (["--seeds", "0", "--page", __file__], "has no place"), (["--seeds", "0", "--out", __file__], "File exists"),
])
def test_bad_input_is_refused_in_one_line(yahoo, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        real.main(["--yahoo", str(yahoo), "--out", str(tmp_path), *words])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
