# SPDX-License-Identifier: MIT
"""docs/scale.md: its tables follow from its formula, which holds for what is measured again on the smallest model."""

import gc
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import memory

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")


def rows(first):
    """Cells of the rows of tables that begin with this."""
    found = re.findall(rf"^\| ({first}.*) \|$", PAGE, flags=re.M)
    return [[cell.strip() for cell in row.split("|")] for row in found]


def test_the_measured_cases_are_those_of_the_program_and_follow_the_formula():
    steps, searches = rows("step "), rows("search ")
    assert [row[1:-4] for row in steps] == [[str(x) for x in case] for case in memory.STEPS]
    assert [row[1:-4] for row in searches] == [[str(x) for x in case] for case in memory.SEARCHES]
    gpu_steps, gpu_searches = rows("GPU step "), rows("GPU search ")
    assert [row[1:-4] for row in gpu_steps] == [[str(x) for x in case] for case in memory.GPU_STEPS]
    assert [row[1:-4] for row in gpu_searches] == [[str(x) for x in case] for case in memory.GPU_SEARCHES]
    for *_, measured, formula, ratio in steps + searches + gpu_steps + gpu_searches:
        assert float(ratio) == pytest.approx(int(measured) / int(formula), abs=0.01)
        assert 0.8 < float(ratio) < 1.1


def test_the_smallest_cases_measured_again_are_those_of_the_page():
    """Of other releases of torch and transformers too, as far as they keep as much."""
    for measure, case, row in ((memory.step, memory.STEPS[0], rows("step ")[0]),
                               (memory.search, memory.SEARCHES[0], rows("search ")[0])):
        n, peak, formula = measure(*case)
        assert f"{n / 1e6:.1f} M" == row[-4] and f"{formula / 2**20:.0f}" == row[-2]
        assert peak / 2**20 == pytest.approx(int(row[-3]), rel=0.1)


def test_bytes_are_counted_while_they_are_alive_and_views_once():
    module = torch.nn.Linear(100, 10, bias=False)  # 4,000 bytes
    with memory.Bytes(module) as counted:
        x = torch.zeros(1000)
        y = x[10:] + 1
        assert counted.now == counted.peak == 4000 + 4000 + 3960
        del y
        gc.collect()
        assert counted.now == 8000 and counted.peak == 11960
        x.add_(1)
        assert counted.now == 8000


def test_the_table_of_models_is_that_of_the_formula():
    """Sizes from the models' own configurations: hidden, intermediate, layers."""
    sizes = {"SmolLM2-135M": (576, 1536, 30), "Qwen3-0.6B": (1024, 3072, 28), "Qwen3-1.7B": (2048, 6144, 28),
             "Qwen2.5-7B": (3584, 18944, 28)}
    table = {row[0]: row[1:] for name in sizes for row in rows(re.escape(name))}
    assert table.keys() == sizes.keys()
    runs = [row for row in rows("GPU step ") if row[2:8] == ["64", "64", "16", "32", "64", "bfloat16"]]
    assert [row[1] for row in runs] == ["107 M", "0.6 B", "1.7 B"]  # in the order of the sizes
    seen = {name: f"{int(row[-3]) * 2**20 / 1e9:.1f}" for name, row in zip(sizes, runs, strict=False)}
    for name, (h, f, layers) in sizes.items():
        P, states, token, step, measured, small, large = table[name]
        assert measured == seen.get(name, "not run")
        P, each = float(P.split()[0]), 0.8 * 4 * layers * (14 * h + 4 * f) / 1e6
        assert float(states) == pytest.approx(16 * P, abs=0.06) and float(token) == pytest.approx(each, abs=0.006)
        total = 16 * P + each * 64 * (32 + 2 + 16 * 2) / 1e3
        assert float(step) == pytest.approx(total, abs=0.06)
        assert (small == "script") == (total < 0.9 * 24) and (large == "script") == (total < 0.9 * 80)
