# SPDX-License-Identifier: MIT
"""Ratings that users chose to give, split by user into what is learnt and what is held out, in nanoadagrpo's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD

from nanoadagrpo import UserError

FILES = "user.txt", "random.txt"
NEGATIVES, ROWS = 15, 16  # beside a like; rated items in a row of the exposure log, at most


class Ratings(NamedTuple):
    chosen: np.ndarray  # (n, 3) user, item, rating: what users chose to rate
    random: np.ndarray  # (users, R, 2) item, liked: what they were given at random
    users: np.ndarray  # (users,) whose these are
    items: int  # how many there are in all


class Split(NamedTuple):
    likes: dict  # user -> items liked, in the seed's order, without those held out
    held: dict  # user -> (target of RL, of validation, of test), of users with five likes or more
    rated: dict  # user -> [(item, rating)], in the seed's order, without those held out


def read(folder):
    try:
        chosen, random = (np.loadtxt(Path(folder) / name, int, delimiter=",", ndmin=2)
                          for name in FILES)
        users, n = np.unique(random[:, 0], return_counts=True)
        if chosen.shape[1] != 3 or random.shape[1] != 3 or len({*n}) != 1:
            raise ValueError("not three columns, or not equally many random items for each user")
    except (OSError, ValueError) as error:
        raise UserError(f"--yahoo {folder}: {error}; expected user.txt and random.txt of user,item,rating") from None
    random = random[np.argsort(random[:, 0], kind="stable"), 1:].reshape(len(users), -1, 2)
    N = int(max(chosen[:, 1].max(), random[..., 0].max())) + 1
    return Ratings(chosen, np.stack([random[..., 0], random[..., 1] >= 4], -1), users, N)


def split(ratings, seed):
    rated, found = {}, Split({}, {}, {})
    for user, item, rating in np.random.default_rng([seed, 1]).permutation(ratings.chosen).tolist():
        rated.setdefault(user, []).append((item, rating))
    for user, mine in sorted(rated.items()):
        likes = [item for item, rating in mine if rating >= 4]
        if len(likes) >= 5:
            found.held[user], likes = tuple(likes[-3:]), likes[:-3]
        found.likes[user] = likes
        found.rated[user] = [(item, r) for item, r in mine if item not in found.held.get(user, ())]
    return found


def semantic_ids(data, N, seed, codes=12, factors=16):
    """[(a, b, c)] of N items: residual k-means of factors of the ratings; c numbers the rest, popular ones first."""
    rows = ((item, user, rating) for user, mine in data.rated.items() for item, rating in mine)
    item, user, rating = np.array(list(rows)).T
    popular = np.bincount(item[rating >= 4], minlength=N)
    matrix = scipy.sparse.csr_matrix((rating - rating.mean(), (item, user)), (N, user.max() + 1))
    place, labels = TruncatedSVD(factors, random_state=seed).fit_transform(matrix), []
    for _ in range(2):
        means = KMeans(codes, n_init=4, random_state=seed).fit(place)
        labels.append(means.labels_)
        place = place - means.cluster_centers_[means.labels_]
    sids, used = [()] * N, {}
    for item in np.argsort(-popular, kind="stable"):
        node = int(labels[0][item]), int(labels[1][item])
        used[node] = used.get(node, -1) + 1
        sids[item] = (*node, used[node])
    return sids


def prompts(data, H):
    """{file: [(user, history, target)]}; a history is what the user liked before, at most H items."""
    found = {"train": [], "rl": [], "valid": [], "test": []}
    for user, likes in data.likes.items():
        held = [*data.held.get(user, ())]
        life, n = likes + held, len(likes)
        for t in range(1, len(life)):
            name = "train" if t < n else ("rl", "valid", "test")[t - n]
            found[name].append((user, life[max(0, t - H) : t], life[t]))
    return found


def rated_log(data, H, generator):
    """[(user, history, shown, click)]: what a user rated, in parts; the history of a part is of the others' likes."""
    found = []
    for user, mine in data.rated.items():
        n = max(2, -(-len(mine) // ROWS))
        for i in range(n):
            shown, rest = mine[i::n], [pair for j in range(n) if j != i for pair in mine[j::n]]
            if shown:
                history = [item for item, rating in rest if rating >= 4][-H:]
                found.append((user, history, [x for x, _ in shown], [int(rating >= 4) for _, rating in shown]))
    return [found[i] for i in generator.permutation(len(found))]


def uniform_log(train, N, generator):
    """[(user, history, shown, click)]: a like against items drawn uniformly.

    Those that are held out may be among them: to spare them would tell the ranker which they are.
    """
    shown = np.column_stack([[target for *_, target in train], generator.integers(N, size=(len(train), NEGATIVES))])
    found = [(user, history, row.tolist(), (row == row[0]).astype(int).tolist())
             for (user, history, _), row in zip(train, shown, strict=True)]
    return [found[i] for i in generator.permutation(len(found))]


def write_rows(path, rows, fields, sids):
    """JSONL as docs/data.md has it; items as Semantic IDs. The user stands in no file."""
    def said(x):
        return [sids[i] for i in x] if isinstance(x, list) else sids[x]

    lines = (json.dumps({name: x if name == "click" else said(x) for name, x in zip(fields, row, strict=True)})
             for _, *row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write(data, N, folder, cfg):
    """The folder that `--data` reads, and beside it one for each exposure log, whose other files hold one row."""
    rows, generator = prompts(data, cfg.max_history), np.random.default_rng([cfg.seed, 2])
    logs = {"": None, "rated": rated_log(data, cfg.max_history, generator),
            "uniform": uniform_log(rows["train"], N, generator)}
    sids = semantic_ids(data, N, cfg.seed)
    for name, log in logs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "catalogue.json").write_text(json.dumps(sids), encoding="utf-8")
        for part, table in rows.items():
            write_rows(folder / name / f"{part}.jsonl", table[:1] if log else table, ("history", "target"), sids)
        if log:
            write_rows(folder / name / "log.jsonl", log, ("history", "shown", "click"), sids)
