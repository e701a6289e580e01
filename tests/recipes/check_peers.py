# SPDX-License-Identifier: MIT
"""Does the newest release of each peer still carry its recipe? One fresh virtual environment per peer, newest release.

    python tests/recipes/check_peers.py                # all of them; about a quarter of an hour and a few GB
    python tests/recipes/check_peers.py trl verl
    python tests/recipes/check_peers.py --exact        # the versions of the docs' table instead of the newest

Exit status 1 if any recipe's test fails. On Linux PyPI's torch brings CUDA along; pip reads PIP_EXTRA_INDEX_URL, which
can point to an index of CPU builds.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
OPTIONS = ["-q", "-s", "-m", "peers", "-o", "addopts="]  # without the project's own, which ask for pytest-xdist


@dataclass(frozen=True)
class Peer:
    package: str  # its name on PyPI
    tested: str  # the version of the table in docs/vendoring.md
    needs: str = ""  # what the test imports besides
    alone: bool = False  # install it without its dependencies, which need CUDA or are not needed


PEERS = {
    "trl": Peer("trl", "1.16.0"),
    "verl": Peer("verl", "0.9.1", "TransferQueue cachetools uvicorn fastapi pillow matplotlib ipython"),
    "openrlhf": Peer(
        "openrlhf", "0.11.2", "deepspeed transformers ray peft datasets aiohttp torchdata pylatexenc", alone=True
    ),
    "liger": Peer("liger-kernel", "0.8.5", "transformers packaging", alone=True),
    "tunix": Peer("google-tunix", "0.1.7", "jax flax humanize optax huggingface_hub", alone=True),
    "minionerec": Peer("accelerate", "1.15.0"),  # MiniOneRec itself is not on PyPI
}


def run(command, **settings):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)


def environment(folder, base=None):
    """The Python of a new virtual environment, which sees the packages of the base too."""
    run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    if base:
        where = [run([p, "-c", "import site; print(site.getsitepackages()[0])"]).stdout.strip() for p in (python, base)]
        Path(where[0], "base.pth").write_text(where[1] + "\n")
    return python


def check(name, folder, base, *, exact):
    """(what happened, version, the measured lines or the end of the log)."""
    peer = PEERS[name]
    wanted = f"{peer.package}=={peer.tested}" if exact else peer.package
    python = environment(folder, base)
    for packages in (peer.needs.split(), [*(["--no-deps"] if peer.alone else []), wanted]):
        done = run([python, "-m", "pip", "install", "-q", *packages]) if packages else None
        if done and done.returncode:
            return "NOT INSTALLED", "", done.stdout[-2000:]
    code = f"from importlib.metadata import version; print(version({peer.package!r}))"
    version = run([python, "-c", code]).stdout.strip()
    done = run([python, "-m", "pytest", *OPTIONS, f"tests/recipes/test_{name}.py"])
    if done.returncode:
        return "BROKEN", version, done.stdout[-4000:]
    measured = "gradient differs", "gradient is off"
    return "works", version, "\n".join(line for line in done.stdout.splitlines() if any(m in line for m in measured))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", choices=[*PEERS, []], help="which; default all")
    parser.add_argument("--exact", action="store_true", help="the versions that the docs name, not the newest")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        base = environment(Path(folder) / "base")
        run([base, "-m", "pip", "install", "-q", TORCH, "numpy", "pytest", "array-api-compat"], check=True)
        for name in arguments.peers or PEERS:
            what, version, text = results[name] = check(name, Path(folder) / name, base, exact=arguments.exact)
            print(f"== {name} {version}: {what}\n{text}\n", flush=True)
    for name, (what, version, _) in results.items():
        print(f"{name:12} {PEERS[name].package:14} docs {PEERS[name].tested:8} now {version:8} {what}")
    return int(any(what != "works" for what, _, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
