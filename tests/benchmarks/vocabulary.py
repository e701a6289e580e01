# SPDX-License-Identifier: MIT
"""How a step's cost grows with the model's vocabulary, beside the script of another commit: `speed.py --words` runs it.

The catalogue has about 1,000 words in each case. The script of today cuts the model to them; that of commit 50361ce
kept all words, and took rows of the embeddings for each step. So that both can be timed in turn, each is a process
that is asked for one step at a time and sleeps meanwhile.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORDS = [1000, 49152, 151936]  # a vocabulary of Semantic IDs alone, SmolLM2's, Qwen3's
B, K, T, METHODS = 4, 16, 61, ("admits 0", "admits 1")


def policy_of(work, shape, words):
    """A policy on a random Llama with so many words, as the script of this checkout makes it."""
    import transformers

    nano = work.nano
    catalogue = work.a_policy("smoke", T, words=999).catalogue
    config = transformers.LlamaConfig(
        vocab_size=words, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **work.SHAPES[shape])
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    rows = range(words - catalogue.S - 1, words)  # of the catalogue's words: the last ones are as good as any
    if hasattr(nano, "cut_vocabulary"):
        known = dict(zip([*catalogue.words, nano.QUERY_TOKEN], rows, strict=True))
        return nano.cut_vocabulary(model, known, catalogue, nano.Settings(device="cpu"))

    class Tokenizer:  # the least that the script of 50361ce asks of one
        def convert_tokens_to_ids(self, names):
            return list(rows)

    return nano.Policy(model, catalogue, nano.Settings(device="cpu"), Tokenizer())


def side(root, shape, words):
    """Says what it has made, then answers each line, the name of a method, with the CPU seconds of its next step."""
    sys.path[:0] = [root, f"{root}/tests/benchmarks"]
    import torch
    import transformers
    import work

    assert Path(work.nano.__file__).parent == Path(root), "another nanoadagrpo.py was imported"
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    policy, admitted = policy_of(work, shape, words), 0

    def admit(difficult, reliable, batch, generator):
        work.core.sample_clip(difficult, reliable)
        return torch.arange(len(difficult)) < admitted

    work.nano.METHODS["admits"] = work.nano.Method(True, admit)
    steps = work.steps(policy, work.some_prompts(policy, 4 * B, T), work.settings(B, K), "admits")
    print(json.dumps(sum(p.numel() for p in policy.model.parameters())), flush=True)
    for line in sys.stdin:
        admitted = int(line.split()[1])
        gc.collect()
        began = time.process_time()
        next(steps)
        print(json.dumps(time.process_time() - began), flush=True)


class Side:
    def __init__(self, root, *what):
        command = [sys.executable, __file__, str(Path(root).resolve()), *map(str, what)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        self.parameters = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended early: {' '.join(self.process.args)}")
        return json.loads(line)

    def step(self):
        """CPU seconds of a step in which a tenth of the prompts are admitted: of B = 4, one in four steps of ten."""
        spent = []
        for method in METHODS:
            self.process.stdin.write(method + "\n")
            self.process.stdin.flush()
            spent.append(self.answer())
        share = 0.1 * B
        return (1 - share) * spent[0] + share * spent[1]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def table(root, before, times, shape="smollm2", sizes=WORDS):
    """Rows of cells: words, parameters and milliseconds of both, their ratio. The first turn warms up."""
    roots, rows = [root, *([before] if before else [])], []
    for words in sizes:
        sides = [Side(each, shape, words) for each in roots]
        turns = []
        for i in range(times + 1):
            found = {one: one.step() for one in sides[:: 1 if i % 2 else -1]}
            turns.append([found[one] for one in sides])
        cells = [f"{words:,}"]
        for one, spent in zip(sides, zip(*turns[1:], strict=True), strict=True):
            one.close()
            cells += [f"{one.parameters / 1e6:.1f}", spread([1000 * x for x in spent], ",.0f")]
        if before:
            cells.append(spread([turn[1] / turn[0] for turn in turns[1:]], ".2f"))
        rows.append(cells)
        print(" | ".join(cells), flush=True)
    head = ["words", "weights, M", "ms"]
    return [[*head, "before: weights, M", "ms", "before / now"] if before else head, *rows]


def spread(values, form):
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}}–{high:{form}})"


if __name__ == "__main__":
    side(sys.argv[1], sys.argv[2], int(sys.argv[3]))
