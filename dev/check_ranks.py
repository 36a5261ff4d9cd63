"""Base and SFT on the same global batch with 1, 2, 3 and 4 processes: losses and weights next to one process's.

python -m dev.check_ranks --steps 20
"""

import tempfile
from pathlib import Path

from dev import tiny
from nanochat.common import Parser, integer, run_script


def largest_differences(base: Path, reference: Path, stage: str) -> tuple[float, float]:
    """Of losses (relative), and of weights (relative to the largest of the tensor)."""
    pairs = list(zip(tiny.losses(base, stage), tiny.losses(reference, stage), strict=True))
    weights = {name: t for name, t in tiny.final_tensors(base, stage).items() if not name.startswith("rank")}
    expected = tiny.final_tensors(reference, stage)
    return (max(abs(a - b) / abs(b) for a, b in pairs),
            max(((t - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-8)).item() for n, t in weights.items()))


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=integer(1), default=20, help="of each training")
    parser.add_argument("--processes", type=integer(2), nargs="+", default=[2, 3, 4], help="world sizes to compare with 1")
    args = parser.parse_args(argv)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        data = tiny.write_corpus(Path(folder) / "data")
        print(f"{'processes':>9} {'stage':>6} {'steps':>6} {'first loss':>11} {'last loss':>10} {'loss, rel.':>11} {'weights, rel.':>14}")
        for processes in (1, *args.processes):
            base = Path(folder) / f"world{processes}"
            env = tiny.environment(base, data)
            tiny.run(tiny.TOKENIZER, env)
            for stage, arguments in (("base", tiny.BASE), ("sft", tiny.SFT)):
                tiny.run([*arguments, f"--num-iterations={args.steps}"], env, processes)
                loss, weights = largest_differences(base, Path(folder) / "world1", stage)
                worst = max(worst, loss)
                values = tiny.losses(base, stage)
                print(f"{processes:>9} {stage:>6} {len(values):>6} {values[0]:>11.6f} {values[-1]:>10.6f} {loss:>11.1e} "
                      f"{weights:>14.1e}", flush=True)
    return {"worst_loss": worst}


if __name__ == "__main__":
    run_script(main)
