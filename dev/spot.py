"""Spot machines: SIGTERM to the process group at random moments, each time resumed at another world size (2, 1, 3, ...).

The documents that the whole has consumed must be those of an undisturbed run, none skipped, none twice: that holds if
every part begins where the one before ended, and the end is the same. Losses are compared too.

python -m dev.spot --stops 6
"""

import random
import signal
import sys
import tempfile
from pathlib import Path

from dev import tiny
from nanochat.checkpoint_manager import find_steps, load_meta
from nanochat.common import Parser, integer, run_script

WORLD_SIZES = (2, 1, 3)


def consumed(base: Path) -> tuple[int, set[int], int]:
    """Of the last checkpoint: its step, the numbers of the documents packed so far, and how many wait in the buffer."""
    directory = base / tiny.SOURCES["base"]
    meta = load_meta(directory, find_steps(directory)[-1])
    loader = meta["loader"]
    return meta["step"], set(range(loader["next"])) - set(loader["waiting"]), len(loader["waiting"])


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=integer(1), default=6, help="how many SIGTERMs")
    parser.add_argument("--steps", type=integer(10), default=60, help="of pretraining")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the moments")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    training = [*tiny.BASE, f"--num-iterations={args.steps}"]
    with tempfile.TemporaryDirectory() as folder:
        calm, spot = Path(folder) / "calm", Path(folder) / "spot"
        data = tiny.write_corpus(Path(folder) / "data", documents=3000)
        for base in (calm, spot):
            tiny.run(tiny.TOKENIZER, tiny.environment(base, data))
        tiny.run(training, tiny.environment(calm, data))
        env = tiny.environment(spot, data)
        print(f"{'part':>4} {'processes':>9} {'signal after step':>17} {'saved at':>9} {'documents':>10} {'waiting':>8}")
        for part in range(args.stops):
            processes = WORLD_SIZES[part % len(WORLD_SIZES)]
            done = consumed(spot)[0] if part else 0
            at = rng.randrange(done + 1, max(done + 2, done + (args.steps - done) // (args.stops - part)))
            process, output = tiny.start(training, env, processes), ""
            for line in process.stdout:
                output += line
                if line.startswith(f"step {at}/"):
                    tiny.kill(process, signal.SIGTERM)
            process.wait()
            if "saved in" not in output:
                sys.exit(f"part {part} did not save:\n{output[-3000:]}")
            step, documents, waiting = consumed(spot)
            print(f"{part + 1:>4} {processes:>9} {at:>17} {step:>9} {len(documents):>10} {waiting:>8}", flush=True)
        tiny.run(training, env, 2)
        same = consumed(spot) == consumed(calm)
        pairs = list(zip(tiny.losses(spot, "base"), tiny.losses(calm, "base"), strict=True))
        worst = max(abs(a - b) / b for a, b in pairs)
        print(f"end: {len(consumed(spot)[1])} documents consumed, {'those' if same else 'NOT those'} of the undisturbed run; "
              f"{len(pairs)} losses, largest relative difference {worst:.1e}")
    if not same:
        sys.exit(1)
    return {"worst": worst}


if __name__ == "__main__":
    run_script(main)
