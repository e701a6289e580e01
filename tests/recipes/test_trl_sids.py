# SPDX-License-Identifier: MIT
"""TRL on Semantic IDs, whole: from a run of nanoadagrpo.py to its table; one step against the script's own step."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nanoadagrpo as nano

pytestmark = pytest.mark.peers
HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
ALONE = ()
TOGETHER = "--multi_gpu", "--num_processes", "2"  # its name for several processes of one machine, CPUs too
SHARDED = ("--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--fsdp_auto_wrap_policy",
           "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")  # fmt: skip
EVALUATION = ["--device", "cpu", "--eval-prompts", "100", "--beam-width", "20"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """DIR and RUN: a made-up shop of some fifty items as JSONL, and the script's run on it, supervised steps alone."""
    folder = tmp_path_factory.mktemp("shop")
    world = nano.toy_world(nano.Settings(device="cpu"), nano.World(codes=6, items=60, users=60, impressions=8))
    sids = [[*map(int, sid)] for sid in world.catalogue.row]
    (folder / "catalogue.json").write_text(json.dumps(sids))

    def write(name, **columns):
        rows = zip(*(x.tolist() for x in columns.values()), strict=True)
        rows = [dict(zip(columns, row, strict=True)) for row in rows]
        for n, row in enumerate(rows):
            row["history"] = row["history"][n % 3 :]  # of various lengths
            items = {key: row[key] for key in ("history", "target", "shown") if key in row}
            row |= {key: [sids[i] for i in x] if isinstance(x, list) else sids[x] for key, x in items.items()}
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name, x in {"train": world.sft, "rl": world.rl, "valid": world.valid, "test": world.test}.items():
        write(name, history=x.history, target=x.target)
    log = world.log
    write("log", history=log.history, shown=log.item, click=log.click, order=log.order)
    run = tmp_path_factory.mktemp("runs") / "base"
    nano.main(["--data", str(folder), "--out", str(run), *EVALUATION, "--sft-steps", "30", "--sft-lr", "1e-2",
               "--rl-steps", "0", "--tau", "0.5", "--rho", "0.8", "--lam", "0.5"])  # fmt: skip
    return folder, run


def train(shop, out, launch=ALONE, *flags):
    """A whole run of the recipe in fresh processes. Returns what each of them noted."""
    starter = ["-m", "accelerate.commands.launch", *launch] if launch else []
    words = ["--data", shop[0], "--run", shop[1], "--out", out, *flags]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, *starter, str(HERE), *map(str, words)], env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(out / f"rank{rank}.npz")) for rank in range(2 if launch else 1)], done


def load(shop, out):
    """Settings, data, ranker and policy of a run, by the script's own functions."""
    import trl_sids
    from safetensors.torch import load_file

    run, _, _, cfg = trl_sids.parse(["--data", str(shop[0]), "--run", str(shop[1]), "--out", str(out)])
    data = nano.load_data(cfg.data, cfg)
    ranker = nano.Ranker(data.catalogue, heads=2)
    ranker.load_state_dict(load_file(run / "ranker.safetensors"))
    return cfg, data, ranker, trl_sids.load_policy(run / "policy", data.catalogue, cfg)


@pytest.mark.parametrize("given", [{"reward": "mine:score"}, {"updates": 2}], ids=str)
def test_a_run_with_settings_that_are_not_known_here_is_refused(tmp_path, capsys, given):
    import trl_sids

    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(nano.Settings(data="shop")) | given))
    with pytest.raises(SystemExit) as end:
        trl_sids.parse(["--run", str(tmp_path), "--out", str(tmp_path / "out")])
    assert end.value.code == 2 and "--reward and --updates are not known here" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [
    (["--run", "nowhere", "--out", "new"], "--run nowhere: "), (["--run", "data", "--out", "new"], "--run data: "),
    (["--run", "run", "--out", "run"], "--out run has to be new"),
    (["--run", "run", "--out", "file"], "--out file has to be new"),
    (["--run", "several", "--out", "new"], "--run several of one method"),
    (["--run", "run", "--out", "new", "--data", "nowhere"], "nowhere: holds neither"),
    (["--run", "run", "--out", "new", "--negatives", "6000"], "--negatives 6000")], ids=" ".join)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(shop, tmp_path, monkeypatch, capsys, words, says):
    import trl_sids

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(shop[0])
    shutil.copytree(shop[1], "run"), shutil.copytree(shop[1], "several")
    shutil.copytree("run/policy", "several/policy/nll"), (tmp_path / "file").write_text("mine")
    config = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(SystemExit) as end:
        trl_sids.main(words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and says in line
    assert (tmp_path / "run" / "config.json").read_text() == config and not (tmp_path / "new").exists()


@pytest.mark.parametrize("given", [[], ["--batch-size", "10"]], ids=str)
def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path, capsys, monkeypatch, given):
    import trl_sids

    monkeypatch.setenv("WORLD_SIZE", "3")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(nano.Settings(data="shop"))))
    with pytest.raises(SystemExit) as end:
        trl_sids.parse(["--run", str(tmp_path), "--out", str(tmp_path / "out"), *given])
    assert end.value.code == 2 and "3 processes cannot share it equally" in capsys.readouterr().err
    assert trl_sids.parse(["--run", str(tmp_path), "--out", str(tmp_path / "out"), "--batch-size", "12"])


def scripts_gradient(shop, out, noted, monkeypatch, **changes):
    """Of the script's train_rl, in its first step, on the rollouts, negatives and rewards that TRL had."""
    import adagrpo_core as core

    cfg, data, ranker, policy = load(shop, out)
    cfg = nano.Settings(**vars(cfg) | changes | dict(micro_batch_size=0))  # its loss is the same with any
    B, K, L = cfg.batch_size, cfg.group_size, data.catalogue.L
    column = {name: torch.from_numpy(np.concatenate([part[name] for part in noted])) for name in noted[0]
              if name in ("tokens", "history", "negative")}  # fmt: skip
    groups = column["tokens"].view(B, K + 1, L)
    history, target = column["history"].view(B, K + 1, -1)[:, 0], data.catalogue.item(groups[:, -1])
    rows = column["negative"].view(B, K + 1)[:, : cfg.negatives]  # of the flat batch, ground truths counted
    assert (rows % (K + 1) < K).all() and (rows // (K + 1) != torch.arange(B)[:, None]).all()

    def given(policy, prompt, select):
        return groups[:, :-1], nano.sequence_logp(policy, prompt, groups[:, :-1])

    class Note(nano.Optimizer):
        def step(self, *_, **__):
            seen.append({name: p.grad.double().numpy() for name, p in policy.model.named_parameters()})
            return torch.tensor(0.0), 0.0

    seen, logged = [], []
    monkeypatch.setattr(nano, "tree_decode", given)
    monkeypatch.setattr(nano, "batches", lambda n, size, steps, generator: torch.arange(B)[None])
    monkeypatch.setattr(core, "in_batch_negatives", lambda keys, *, k, m: rows - rows // (K + 1))
    monkeypatch.setattr(nano, "Optimizer", Note)
    score = nano.make_reward(ranker.double(), cfg)
    prompts = nano.Prompts(history, target, torch.arange(B))
    nano.train_rl(policy, lambda *x: score(*x).float(), prompts, cfg, "adagrpo", lambda **row: logged.append(row))
    return seen[0], float(logged[0]["admitted"])


@pytest.mark.parametrize("launch, flags", [
    (ALONE, {}),
    (ALONE, dict(micro_batch_size=4, negatives=3)),
    (TOGETHER, dict(negatives=2)),
    (SHARDED, {}),
], ids=["alone", "micro-batches", "two processes", "two processes, FSDP"])  # fmt: skip
def test_the_gradient_of_a_step_is_that_of_the_scripts_own_step(shop, tmp_path, monkeypatch, launch, flags):
    flags = dict(batch_size=16, group_size=7, rl_steps=1) | flags
    words = [word for name, x in flags.items() for word in (nano.to_flag(name), x)]
    noted, _ = train(shop, tmp_path / "out", launch, *words)
    expected, admitted = scripts_gradient(shop, tmp_path / "out", noted, monkeypatch, **flags)
    assert 0 < admitted < 1 and admitted == noted[0]["admitted"]
    whole = np.concatenate([x.ravel() for x in expected.values()])
    for part in noted:
        assert part["sharded"] == (launch == SHARDED)
        found = np.concatenate([part[f"gradient/{name}"].ravel() for name in expected])
        off = np.linalg.norm(found - whole) / np.linalg.norm(whole)
        print(f"TRL on Semantic IDs: gradient differs by {off:.1e} of its length from that of train_rl; "
              f"{admitted:.0%} of the prompts admitted")  # fmt: skip
        assert off < 1e-5


def test_a_whole_run_learns_and_what_it_saved_is_a_policy_of_the_script(shop, tmp_path):
    flags = "--rl-steps", 40, "--batch-size", 16, "--group-size", 7, "--lr", 3e-3
    noted, done = train(shop, tmp_path / "out", ALONE, *flags)
    logs = [log for log in json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
            if "adagrpo/nll" in log]  # fmt: skip
    assert logs[-1]["adagrpo/nll"] < logs[0]["adagrpo/nll"] - 0.1
    assert 0 < np.mean([log["adagrpo/admitted"] for log in logs]) < 1

    # The table: before is what the script's own report says, after is better, and both can be had again.
    cfg, data, ranker, policy = load(shop, tmp_path / "out")
    test = nano.subset(data.test, cfg.eval_prompts, cfg.seed, "test")
    after = nano.Policy(policy.model.from_pretrained(tmp_path / "out"), data.catalogue, cfg)
    before, after = (nano.evaluate(x, ranker, test, cfg)[0] for x in (policy, after))
    lines = nano.table(
        {"before": before, "after": after | {"admitted": float(noted[0]["admitted"])}}, nano.COLUMNS).splitlines()
    printed = done.stdout.splitlines()
    assert lines[2] in printed and after["hr@10"] > before["hr@10"]
    assert any(line.startswith("| after") and line.split("|")[2:-2] == lines[3].split("|")[2:-2] for line in printed)
    report = (shop[1] / "report.md").read_text()
    assert lines[2].split("|")[2:] in [line.split("|")[2:] for line in report.splitlines()]

    # An ordinary policy again: the script trains on from it, and its config has no padding token.
    config = [json.loads((folder / "config.json").read_text()) for folder in (shop[1] / "policy", tmp_path / "out")]
    assert config[0] == config[1]
    again = ["--sft-steps", "0", "--rl-steps", "0", "--model", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
    found = nano.main(["--data", str(shop[0]), *EVALUATION, *again])
    assert found["base"]["hr@10"] == pytest.approx(after["hr@10"])


def test_constrained_generation_samples_items_and_nothing_else(shop, tmp_path):
    base = json.loads((shop[1] / "metrics.jsonl").read_text().splitlines()[-1])
    assert base["phase"] == "test" and base["sampled_hallucination"] > 0.1  # without the flag
    flags = "--rl-steps", 1, "--batch-size", 16, "--group-size", 7, "--constrained"
    noted, _ = train(shop, tmp_path / "out", ALONE, *flags)
    assert (load(shop, tmp_path)[1].catalogue.item(torch.from_numpy(noted[0]["tokens"])) >= 0).all()


def test_what_cannot_work_is_refused(shop, tmp_path):
    import transformers
    import trl_sids

    cfg, data, _, policy = load(shop, tmp_path)
    other = nano.Catalogue([(7, 8, 9), (7, 8, 10)])
    with pytest.raises(ValueError, match="its words are not the Semantic IDs of the data"):
        trl_sids.load_policy(shop[1] / "policy", other, cfg)
    trl_sids.check_padding(policy)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=data.catalogue.S + 1, n_embd=16, n_layer=1, n_head=2, n_positions=64,
                                     initializer_range=0.3, bos_token_id=None, eos_token_id=None)  # fmt: skip
    learned = nano.Policy(transformers.AutoModelForCausalLM.from_config(config), data.catalogue, cfg)
    with pytest.raises(ValueError, match="padding on the left"):
        trl_sids.check_padding(learned)


# -- in the processes that `train` starts ------------------------------------------------------------------------------


def shard_on_cpus(trl_sids):
    """accelerate shards on GPUs and the like alone: once the processes have met by gloo, call their CPUs such."""
    from accelerate import state

    make, begin = trl_sids.GRPOConfig, state.AcceleratorState.__init__

    def init(self, *positional, **keyword):
        shared, kinds = state.PartialState._shared_state, state.DistributedType
        if shared["distributed_type"] == kinds.MULTI_CPU:
            shared["distributed_type"] = kinds.MULTI_XPU
        begin(self, *positional, **keyword)

    def config(*positional, **keyword):
        args = make(*positional, **keyword)
        assert args.device.type == "cpu" and torch.distributed.is_initialized()
        state.AcceleratorState.__init__ = init
        return args

    trl_sids.GRPOConfig = config


def worker(argv):
    sys.path.insert(0, str(ROOT / "docs" / "recipes"))
    import trl_sids
    from transformers import TrainerCallback
    from trl_adagrpo import AdaGRPOTrainer
    from trl_worker import leave

    noted = {}

    class Spy(AdaGRPOTrainer):
        """The recipe, with its last batch noted before TRL shuffles it."""

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            noted["tokens"] = batch["completion_ids"].numpy().copy()
            noted["history"] = np.array([example["history"] for example in inputs])
            noted["admitted"] = self._metrics["train"]["adagrpo/admitted"][-1]
            return batch

    def note_negatives(keys, *, k, m):
        rows = negative_rows(keys, k=k, m=m)
        n, here = len(keys) * (k + 1), int(os.environ.get("RANK", 0))
        each = rows.repeat_interleave(k + 1, 0)[range(n), torch.arange(n) % (k + 1) % m]  # scored by each row
        noted["negative"] = each.chunk(int(os.environ.get("WORLD_SIZE", 1)))[here].numpy()
        return rows

    class NoteGradient(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            if args.max_steps == 1:
                args.max_grad_norm = 0.0  # as the gradient is, before it is clipped

        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            for name, parameter in model.named_parameters():
                gradient = parameter.grad
                noted["sharded"] = hasattr(gradient, "full_tensor")
                gradient = gradient.full_tensor() if noted["sharded"] else gradient
                noted[f"gradient/{name.removeprefix('module.')}"] = gradient.double().numpy()

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus(trl_sids)
    trl_adagrpo = sys.modules["trl_adagrpo"]
    negative_rows, trl_adagrpo.negative_rows = trl_adagrpo.negative_rows, note_negatives
    _, trainer = trl_sids.main(argv, cls=Spy, callbacks=[NoteGradient()])
    np.savez(f"{trainer.args.output_dir}/rank{trainer.args.process_index}.npz", **noted)
    leave(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1:])
