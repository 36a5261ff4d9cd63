"""Kill a tiny pipeline (download, tokenizer, base, SFT; 2 processes) again and again, and run the same command again.

Some kills come at random moments, some in the middle of a save or of a download, from a server that itself breaks off
every third answer. At the end the weights must be those of a run that nobody disturbed, to the last bit; after every
kill every checkpoint that can be found must be readable.

python -m dev.kill_sweep --kills 30
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from dev import tiny
from dev.fake_hub import Hub
from nanochat.checkpoint_manager import find_steps, load_meta, load_tensors
from nanochat.common import Parser, UserError, integer, repo_dir, run_script
from nanochat.dataset import CLIMBMIX_LAST, CLIMBMIX_REPO, shard_name

DOWNLOADING = 5  # so many kills come while shards are downloaded; then, in turn, at a random moment and in a save


def pipeline(base_steps: int, sft_steps: int) -> None:
    """The command that is killed and repeated: every stage goes on where it stopped."""
    arguments = [[["nanochat.dataset", "-n", "2", "-w", "1"], 1], [tiny.TOKENIZER, 1],
                 [[*tiny.BASE, f"--num-iterations={base_steps}", "--save-every=5"], 2],
                 [[*tiny.SFT, f"--num-iterations={sft_steps}", "--save-every=5"], 2]]
    for stage, processes in arguments:
        subprocess.run(tiny.command(stage, processes), cwd=repo_dir(), check=True)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL the pipeline and all that it has started, the ranks too, which have sessions of their own."""
    victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in victims:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    process.wait()
    psutil.wait_procs(victims, timeout=10)


def wait_for_moment(kind: str, base: Path, process, rng) -> str:
    """Return when it is time to kill -> the moment that came, or "ended"; one that does not come
    within 30 s is random."""
    pattern = {"saving": "*_checkpoints/*/*.tmp", "downloading": "*/*.partial"}.get(kind)
    began, deadline = time.time(), time.monotonic() + (rng.uniform(1, 25) if pattern is None else 30)
    while process.poll() is None and time.monotonic() < deadline:
        if pattern and any(_modified(path) > began for path in base.glob(pattern)) and rng.random() < 0.2:
            return kind
        time.sleep(0.002)
    return "ended" if process.poll() is not None else "random"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # renamed meanwhile
        return 0.0


def check_checkpoints(base: Path) -> tuple[int, int]:
    """Read every checkpoint that the scripts would find -> how many, and how many could not be read."""
    found = bad = 0
    for directory in (base / path for path in tiny.SOURCES.values()):
        for step in find_steps(directory):
            found += 1
            try:
                load_meta(directory, step)
                load_tensors(directory / f"model_{step:06d}.pt")
                for rank in range(2):
                    load_tensors(directory / f"optim_{step:06d}_rank{rank}.pt")
            except UserError:
                bad += 1
    return found, bad


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=integer(1), default=30, help="how often")
    parser.add_argument("--base-steps", type=integer(5), default=150, help="of pretraining")
    parser.add_argument("--sft-steps", type=integer(5), default=100, help="of finetuning")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the moments")
    parser.add_argument("--pipeline", action="store_true", help="the pipeline itself, in this process's environment")
    args = parser.parse_args(argv)
    if args.pipeline:
        return pipeline(args.base_steps, args.sft_steps)
    rng, kills, unreadable = random.Random(args.seed), [], 0
    itself = [sys.executable, "-m", "dev.kill_sweep", "--pipeline", f"--base-steps={args.base_steps}",
              f"--sft-steps={args.sft_steps}"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = tiny.write_corpus(folder / "data", documents=3000)
        hub = Hub(drop_share=1 / 3, bytes_per_s=100_000)
        for index, name in ((0, "a"), (1, "b"), (CLIMBMIX_LAST, "val")):
            hub.files[f"/datasets/{CLIMBMIX_REPO}/resolve/main/{shard_name(index)}"] = (data / f"{name}.parquet").read_bytes()

        def begin(name):
            env = tiny.environment(folder / name, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)
            log = open(folder / f"{name}.log", "a")
            return subprocess.Popen(itself, cwd=repo_dir(), env=env, stdout=log, stderr=subprocess.STDOUT)

        calm = begin("calm")
        if calm.wait():
            sys.exit(f"the undisturbed run failed:\n{(folder / 'calm.log').read_text()[-3000:]}")
        print(f"{'kill':>4}  {'moment':<12}{'after':>7}  {'stage':<11}{'checkpoints':>12}{'unreadable':>11}", flush=True)
        process = begin("killed")
        while len(kills) < args.kills:
            started = time.monotonic()
            wanted = "downloading" if len(kills) < DOWNLOADING else ("random", "saving")[len(kills) % 2]
            moment = wait_for_moment(wanted, folder / "killed", process, rng)
            if moment == "ended":
                if process.returncode:
                    sys.exit(f"a restarted run failed:\n{(folder / 'killed.log').read_text()[-3000:]}")
                process = begin(advance(folder))  # all done: once more from the beginning, in a folder of its own
                continue
            kill_tree(process)
            base = folder / "killed"
            found, bad = check_checkpoints(base)
            unreadable += bad
            kills.append(moment)
            stage = "finetuning" if (base / tiny.SOURCES["sft"]).exists() else "pretraining" if \
                (base / tiny.SOURCES["base"]).exists() else "tokenizer" if list(base.glob("*/shard_06542.parquet")) else "download"
            print(f"{len(kills):>4}  {moment:<12}{time.monotonic() - started:>6.1f}s  {stage:<11}{found:>12}{bad:>11}", flush=True)
            process = begin("killed")
        if process.wait():
            sys.exit(f"the last run failed:\n{(folder / 'killed.log').read_text()[-3000:]}")
        identical = True
        for base in [folder / "killed", *folder.glob("finished*")]:
            for stage in tiny.SOURCES:
                expected, got = tiny.final_tensors(folder / "calm", stage), tiny.final_tensors(base, stage)
                same = expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in expected)
                identical &= same
                print(f"{base.name}: {stage}, {len(got)} tensors of weights and optimizer state, "
                      f"{'bit-identical to' if same else 'DIFFERENT from'} the undisturbed run")
    print(f"{len(kills)} kills ({', '.join(f'{kills.count(m)} {m}' for m in sorted(set(kills)))}), {unreadable} unreadable "
          "checkpoints found")
    if not identical or unreadable:
        sys.exit(1)
    return {"kills": len(kills)}


def advance(folder: Path) -> str:
    """Put a finished run aside -> name of the next one's folder."""
    number = len(list(folder.glob("finished*"))) + 1
    (folder / "killed").rename(folder / f"finished{number}")
    return "killed"


if __name__ == "__main__":
    run_script(main)
