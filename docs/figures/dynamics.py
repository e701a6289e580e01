# SPDX-License-Identifier: MIT
"""Training dynamics of a run, the paper's Figure 3: what the validation set and the gate say along its steps.

    python docs/figures/dynamics.py RUN      # writes RUN/dynamics.png, also while it runs; needs matplotlib
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

PANELS = {"validation HR@10 (%)": ("valid", "hr@10"), "admitted (%)": ("rl", "admitted"),
          "validation hallucination (%)": ("valid", "hallucination"),
          "validation p(click), best of 10": ("valid", "click_reward@10")}


def curves(rows):
    """{panel: {method: (steps, values)}}; what was not logged has no points."""
    found = {}
    for title, (phase, key) in PANELS.items():
        found[title] = {}
        for method in dict.fromkeys(row["method"] for row in rows if row["phase"] == "rl"):
            mine = [row for row in rows if (row["phase"], row.get("method")) == (phase, method) and key in row]
            y, n = [row[key] for row in mine], 20 if phase == "rl" else 1  # a batch admits in steps of 1/B
            y = [np.mean(y[max(0, i + 1 - n) : i + 1]) * (100 if "%" in title else 1) for i in range(len(y))]
            found[title][method] = [row["step"] for row in mine], y
    return found


def draw(rows, path):
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(PANELS)), curves(rows).items(), strict=True):
        for method, (x, y) in lines.items():
            axes.plot(x, y, label=method)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder that nanoadagrpo.py wrote")
    out = parser.parse_args(argv).run
    try:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        if not any(row["phase"] == "rl" for row in rows):
            parser.error(f"{out}: has no RL step, or none so far")
        draw(rows, out / "dynamics.png")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}; name one folder that nanoadagrpo.py wrote")
    except (ValueError, KeyError, TypeError) as error:
        what = f"{out / 'metrics.jsonl'}: {type(error).__name__}: {error!s:.100}"
        parser.error(f"{what}; name one folder that nanoadagrpo.py wrote")
    print(out / "dynamics.png")


if __name__ == "__main__":
    main()
