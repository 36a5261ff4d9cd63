"""One csv of many pretraining runs, from their checkpoints' metadata and metrics.jsonl: a row a finished run.

python -m dev.collect_runs 'miniseries_*' --output miniseries.csv
"""

import csv
import fnmatch
from pathlib import Path

from nanochat.checkpoint_manager import config_from_meta, find_steps, load_meta, source_dir
from nanochat.common import Parser, UserError, run_script
from nanochat.report import read_metrics
from nanochat.scaling import count_parameters


def describe(directory: Path) -> dict | None:
    """A finished run's row, None for one that is not finished."""
    steps = find_steps(directory)
    meta = load_meta(directory, steps[-1]) if steps else None
    if meta is None or meta["step"] != meta["plan"]["num_iterations"]:
        return None
    config, plan, metrics = config_from_meta(meta["model_config"]), meta["plan"], read_metrics(directory)
    counts, tokens = count_parameters(config), meta["step"] * plan["total_batch_size"]

    def median(name):
        values = sorted(line[name] for line in metrics if line.get(name) is not None)
        return values[len(values) // 2] if values else ""

    cores = [line["core"] for line in metrics if "core" in line]
    return {"tag": directory.name, "depth": config.n_layer, "width": config.n_embd, "vocab_size": config.vocab_size,
            "target_flops": meta["user_config"]["target_flops"] or "", "flops": tokens * plan["flops_per_token"],
            "parameters": counts["total"], "scaling_parameters": counts["scaling"], "tokens": tokens,
            "tokens_per_parameter": tokens / counts["scaling"], "total_batch_size": plan["total_batch_size"],
            "val_bpb": meta["val_bpb"], "core": cores[-1] if cores else "", "training_s": meta["loop"]["trained_s"],
            "tokens_per_s": median("tokens_per_s"), "mfu": median("mfu"), "world_size": meta["world_size"]}


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("tags", nargs="+", help="of the runs; * stands for anything")
    parser.add_argument("--output", required=True, help="the csv file")
    args = parser.parse_args(argv)
    root = source_dir("base")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and ".previous" not in p.name) if root.is_dir() else []
    wanted = [name for name in names if any(fnmatch.fnmatchcase(name, tag) for tag in args.tags)]
    rows = [row for name in wanted if (row := describe(root / name)) is not None]
    if not rows:
        raise UserError(f"no finished run in {root} has a tag like {' or '.join(args.tags)}; there are: {', '.join(names) or 'none'}")
    rows.sort(key=lambda row: (float(row["target_flops"] or 0), row["depth"], row["tag"]))
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'tag':<24}{'depth':>6}{'FLOPs':>10}{'parameters':>12}{'tokens':>11}{'ratio':>8}{'val_bpb':>9}{'CORE':>8}{'time, s':>9}")
    for row in rows:
        core = f"{row['core']:.4f}" if row["core"] != "" else "-"
        print(f"{row['tag']:<24}{row['depth']:>6}{row['flops']:>10.2e}{row['scaling_parameters']:>12,}{row['tokens']:>11.3g}"
              f"{row['tokens_per_parameter']:>8.1f}{row['val_bpb']:>9.4f}{core:>8}{row['training_s']:>9.0f}")
    unfinished = len(wanted) - len(rows)
    print(f"{len(rows)} runs in {args.output}" + (f"; {unfinished} not finished" if unfinished else ""))
    return {"rows": rows}


if __name__ == "__main__":
    run_script(main)
