"""The report of a run: one page, as markdown and as html, from what its stages have left in the base directory.

python -m nanochat.report generate --model-tag cpu
python -m nanochat.report reset
"""

import base64
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import torch

from nanochat.checkpoint_manager import SOURCES, config_from_meta, find_run, find_steps, load_meta, source_dir
from nanochat.common import Parser, get_base_dir, number, print0, read_json, repo_dir, run_script
from nanochat.progress import clock, human
from nanochat.scaling import count_parameters

STAGES = {"base": "Pretraining", "mid": "Midtraining", "sft": "Finetuning", "rl": "Reinforcement learning"}
TALKS = ("three questions", "a question")  # stages whose output is shown as it is
IMPORTANT = {  # settings that are shown where they are there
    "base": "depth max_seq_len window_pattern total_batch_size device_batch_size embedding_lr unembedding_lr matrix_lr scalar_lr "
            "weight_decay warmdown_ratio fp8",
    "mid": "source builtin init_lr_frac",
    "rl": "task examples_per_step num_samples max_new_tokens temperature top_k embedding_lr unembedding_lr matrix_lr init_lr_frac",
}
IMPORTANT["sft"] = IMPORTANT["mid"]
HOURLY_DOLLARS = {"h200": 3.5, "h100": 3.0, "a100": 1.8}  # of one rented GPU, a rough figure of 2026, where no --price is given
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2330; background: #fff }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem } h1 { margin-top: 0 } h2 { border-bottom: 1px solid #d9dee8; padding-bottom: .2rem }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e4e8f0; text-align: left; vertical-align: top } th { background: #f4f6fa }
thead:not(:has(th:not(:empty))) { display: none }
img { max-width: 100%; height: auto } code { font-size: .9em } pre { background: #f4f6fa; padding: .8rem; overflow-x: auto;
white-space: pre-wrap; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body { color: #dfe4ee; background: #14181f } th, pre { background: #1f2530 }
th, td, h2 { border-color: #333b49 } img { background: #fff; border-radius: .3rem } }
"""


# --- what there is ------------------------------------------------------------------------------------------------


def report_dir(tag: str) -> Path:
    return get_base_dir() / "report" / tag


def read_metrics(directory: Path) -> list[dict]:
    """Lines of a run's metrics.jsonl; a line that a crash cut off is left out."""
    lines = []
    try:
        text = (directory / "metrics.jsonl").read_text()
    except OSError:
        return []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def last_meta(source: str, tag: str) -> dict | None:
    """Meta of the last checkpoint of a stage, None where the run has not had it."""
    steps = find_steps(source_dir(source) / tag)
    return load_meta(source_dir(source) / tag, steps[-1]) if steps else None


def stage_times(tag: str) -> list[tuple[str, int]]:
    """Seconds that each stage took, all of its starts together, in the order in which they ended first."""
    seconds: dict[str, int] = {}
    try:
        for line in (get_base_dir() / "logs" / tag / "times.txt").read_text().splitlines():
            _, name, took = line.split()
            seconds[name.replace("_", " ")] = seconds.get(name.replace("_", " "), 0) + int(took)
    except (OSError, ValueError):
        pass
    return list(seconds.items())


def machine() -> dict[str, str]:
    """What this machine is, and the state of the repository."""

    def git(*arguments) -> str:
        done = subprocess.run(["git", *arguments], cwd=repo_dir(), capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.+)", cpuinfo)
    changed = len(git("status", "--porcelain").splitlines())
    facts = {"GPUs": f"{len(gpus)} x {gpus[0]}" if gpus else "none",
             "CPU": f"{model[1] if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores",
             "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
             "system": f"{platform.system()} {platform.release()}",
             "Python, PyTorch": f"{platform.python_version()}, {torch.__version__}"}
    if git("rev-parse", "HEAD"):
        facts["git"] = f"{git('rev-parse', '--short', 'HEAD')} on {git('rev-parse', '--abbrev-ref', 'HEAD')} " \
                       f"({git('log', '-1', '--format=%cs')}), " + (f"{changed} files changed since" if changed else "nothing changed since")
    return facts


# --- pieces of markdown -------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list]) -> str:
    def line(cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    numbers = [all(re.match(r"[-+$]?\d|-$", str(row[i])) for row in rows) and any(header) for i in range(len(header))]
    return "\n".join([line(header), line(["---:" if number else "---" for number in numbers]), *map(line, rows)])


def fenced(text: str) -> str:
    return "```text\n" + text.strip().replace("```", "'''") + "\n```"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def draw(path: Path, panels: list[tuple[str, str, dict[str, list[tuple[float, float]]]]]) -> str | None:
    """A picture of panels (title, label of y, lines of points by name) side by side -> its markdown, None if all are empty."""
    panels = [(title, label, {name: points for name, points in lines.items() if points}) for title, label, lines in panels]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (title, label, lines) in zip(axes[0], panels):
        for name, points in lines.items():
            few = len(points) < 30
            axis.plot(*zip(*points), label=name, linewidth=1.4, marker="o" if few else None, markersize=4)
        axis.set(title=title, xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"![{', '.join(title for title, _, _ in panels)}]({path.name})"


def curve(metrics: list[dict], name: str, window: int = 1) -> list[tuple[float, float]]:
    """(step, value) points of a metric, each the mean of the last `window`."""
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    values = [value for _, value in points]
    return [(step, sum(values[max(0, i + 1 - window):i + 1]) / len(values[max(0, i + 1 - window):i + 1]))
            for i, (step, _) in enumerate(points)]


# --- sections -----------------------------------------------------------------------------------------------------


def training_section(source: str, tag: str, folder: Path) -> list[str]:
    meta = last_meta(source, tag)
    if meta is None:
        return []
    directory, settings = source_dir(source) / tag, meta["user_config"]
    metrics, config = read_metrics(directory), config_from_meta(meta["model_config"])
    loop, plan, steps = meta["loop"], meta.get("plan", {}), (meta.get("plan") or settings)["num_iterations"]
    facts = [["steps", f"{meta['step']:,} of {steps:,}" + ("" if meta["step"] == steps else " (not finished)")],
             ["training time", clock(loop["trained_s"])]]
    if source == "base":
        counts = count_parameters(config)
        facts = [["parameters", f"{human(counts['total'])} ({human(counts['scaling'])} for scaling)"],
                 ["tokens", f"{human(meta['step'] * plan['total_batch_size'])}, "
                            f"{meta['step'] * plan['total_batch_size'] / counts['scaling']:.1f} per scaling parameter"],
                 ["FLOPs", human(meta["step"] * plan["total_batch_size"] * plan["flops_per_token"])], *facts]
    rates = [line["tokens_per_s"] for line in metrics if "tokens_per_s" in line]
    mfus = [line["mfu"] for line in metrics if line.get("mfu")]
    if rates:
        facts.append(["tokens/s, median", human(sorted(rates)[len(rates) // 2]) + (f", MFU {sorted(mfus)[len(mfus) // 2]:.0%}" if mfus else "")])
    memory = [line["memory_bytes"] for line in metrics if "memory_bytes" in line]
    if memory:
        facts.append(["peak memory", f"{max(memory) / 2**30:.1f} GiB a process, {meta['world_size']} process{'es' * (meta['world_size'] > 1)}"])
    if meta.get("val_bpb") is not None:
        facts.append(["validation, bits per byte", f"{meta['val_bpb']:.4f}"])
    facts += [[f"{name}, held-out problems, sampled", f"{before:.1%} before, {after:.1%} after"]
              for name, before, after in _first_and_last(metrics)]
    if loop["skipped"]:
        facts.append(["steps skipped (not finite)", loop["skipped"]])
    window = max(1, len(rates) // 50)
    if source == "rl":
        panels = [("reward", "mean of a step", {"reward": curve(metrics, "reward"), f"mean of {max(5, window)} steps": curve(metrics, "reward", max(5, window))}),
                  ("held-out problems", "share solved", {name: curve(metrics, name) for name in [n for n, _, _ in _first_and_last(metrics)]}),
                  ("tokens of an answer", "mean of a step", {"tokens": curve(metrics, "answer_tokens")})]
    else:
        panels = [("loss", "nats a token", {"training": curve(metrics, "loss", window)}),
                  ("validation", "bits per byte", {"val_bpb": curve(metrics, "val_bpb")}),
                  ("CORE", "centered accuracy", {"CORE": curve(metrics, "core")}),
                  ("ChatCORE", "centered accuracy", {"ChatCORE": curve(metrics, "chatcore")})]
    picture = draw(folder / f"{source}.png", panels)
    shown = [[name.replace("_", " "), settings[name]] for name in IMPORTANT[source].split() if settings.get(name) not in (None, False)]
    if source == "base":
        c = config
        shown.insert(0, ["model", f"depth {c.n_layer}, width {c.n_embd}, {c.n_head} heads, context {c.sequence_len}, vocabulary {c.vocab_size:,}"])
    mixture = [[name, f"{rows:,}", epochs] for name, rows, epochs in meta.get("mixture", [])]
    return [f"## {STAGES[source]}", table(["", ""], facts), picture or "",
            *(["Conversations:", table(["set", "rows", "epochs"], mixture)] if mixture else []),
            "Settings:", table(["setting", "value"], shown)]


def _first_and_last(metrics: list[dict]) -> list[tuple[str, float, float]]:
    """pass@k before and after reinforcement learning."""
    evaluated = [line for line in metrics if "pass@1" in line]
    return [(name, evaluated[0][name], evaluated[-1][name]) for name in evaluated[0] if name.startswith("pass@")] if evaluated else []


def tokenizer_section() -> list[str]:
    folder = get_base_dir() / "tokenizer"
    settings, compared = read_json(folder / "settings.json"), read_json(folder / "tok_eval.json")
    if not settings:
        return []
    parts = ["## Tokenizer", f"{settings['vocab_size']:,} tokens, trained on up to {human(settings['max_chars'])} characters of "
             f"{len(settings['files'])} files."]
    if compared:
        names = list(compared)
        parts.append(table(["bytes per token", *names], [[kind, *(f"{compared[n][kind]:.2f}" for n in names)] for kind in compared[names[0]]]))
    return parts


def core_section(tag: str, meta: dict) -> list[str]:
    stem = get_base_dir() / "base_eval" / f"{tag}_{meta['step']:06d}"
    results, parts = read_json(stem.with_suffix(".json")) or {}, []
    bits = [[split, f"{results[f'{split}_bpb']:.4f}"] for split in ("train", "val") if f"{split}_bpb" in results]
    if bits:
        parts.append(table(["split", "bits per byte"], bits))
    if stem.with_suffix(".csv").exists():
        with open(stem.with_suffix(".csv"), newline="") as file:
            header, *rows = csv.reader(file)
        limit = results.get("max_per_task")
        parts += ["CORE, centered accuracies, next to GPT-2's" + (f" (at most {limit} items a task here)" if limit else "") + ":",
                  table([header[0], "this model", *header[3:]], [[r[0], *(f"{float(value):.4f}" for value in r[2:])] for r in rows])]
    if results.get("samples"):
        parts += ["Samples:", fenced("\n\n".join(results["samples"]))]
    return ["## Base model, evaluated", *parts] if parts else []


def chat_results(tag: str) -> dict[str, dict]:
    """Results of chat_eval on the last checkpoint of each stage."""
    found = {}
    for source in SOURCES:
        meta = last_meta(source, tag)
        result = meta and read_json(get_base_dir() / "chat_eval" / f"{source}_{tag}_{meta['step']:06d}.json")
        if result:
            found[source] = result
    return found


def chat_section(chats: dict[str, dict]) -> list[str]:
    if not chats:
        return []
    rows = [[STAGES[source], name, f"{r['correct']} of {r['total']}", share(r["accuracy"]), share(r["standard_error"]), f"{r['centered']:.4f}"]
            for source, result in chats.items() for name, r in result["tasks"].items()]
    return ["## Chat model, evaluated", table(["after", "task", "right", "accuracy", "+-", "centered"], rows)]


def talk_section(tag: str) -> list[str]:
    for name in TALKS:
        log = get_base_dir() / "logs" / tag / f"{re.sub('[^a-zA-Z0-9]', '_', name)}.log"
        if log.exists():
            return ["## A short talk", fenced(log.read_text(errors="replace"))]
    return []


def summary_section(tag: str, chats: dict[str, dict]) -> list[str]:
    """A row a metric, a column a stage."""
    metas = {source: meta for source in SOURCES if (meta := last_meta(source, tag))}
    rows = {}

    def put(metric, source, value):
        rows.setdefault(metric, {})[source] = value

    for source, meta in metas.items():
        if meta.get("val_bpb") is not None:
            put("val_bpb" if source == "base" else "val_bpb, of answers", source, f"{meta['val_bpb']:.4f}")
        put("training time", source, clock(meta["loop"]["trained_s"]))
        for name, result in (chats[source]["tasks"].items() if source in chats else ()):
            put(name, source, share(result["accuracy"]))
        if chats.get(source, {}).get("chatcore") is not None:
            put("ChatCORE", source, f"{chats[source]['chatcore']:.4f}")
    if "base" in metas:
        core = (read_json(get_base_dir() / "base_eval" / f"{tag}_{metas['base']['step']:06d}.json") or {}).get("core")
        if core is not None:
            put("CORE", "base", f"{core:.4f}")
    order = ["val_bpb", "CORE", "val_bpb, of answers", *sorted(set(rows) - {"val_bpb", "CORE", "val_bpb, of answers", "ChatCORE", "training time"}), "ChatCORE", "training time"]
    return ["## Summary", table(["metric", *metas], [[name, *(rows[name].get(s, "-") for s in metas)] for name in order if name in rows])]


def cost_section(tag: str, price: float | None) -> list[str]:
    """Wall-clock time by stage and in all, and what it cost."""
    times = stage_times(tag)
    if times:
        seconds, source = sum(took for _, took in times), "the stages of the script that ran them, interrupted ones included"
    else:
        seconds = sum(meta["loop"]["trained_s"] for s in SOURCES if (meta := last_meta(s, tag)))
        source = "the trainings alone: the stages were not run by a script of runs/"
        start = read_json(get_base_dir() / "report" / "start.json")
        if start:
            seconds, source = time.time() - start["time"], "since `report reset`"
    hourly, basis = price, f"${price or 0:g} an hour, as given"
    if not price and torch.cuda.is_available():
        name = torch.cuda.get_device_name(0).lower()
        hourly = next((rate for part, rate in HOURLY_DOLLARS.items() if part in name), 0) * torch.cuda.device_count()
        basis = f"${hourly:g} an hour for {torch.cuda.device_count()} GPUs, our assumption (--price sets it)"
    cost = f"about ${seconds / 3600 * hourly:,.2f} at {basis}" if hourly else "no price is known (--price gives the machine's, dollars an hour)"
    parts = ["## Time and cost", f"**{clock(seconds)}** of wall-clock time ({source}); {cost}."]
    return parts + ([table(["stage", "time"], [[name, clock(took)] for name, took in times])] if times else [])


def generate(tag: str, price: float | None = None) -> Path:
    """Write report.md, report.html and their pictures -> the folder."""
    folder = report_dir(tag)
    folder.mkdir(parents=True, exist_ok=True)
    chats, base = chat_results(tag), last_meta("base", tag)
    parts = [f"# nanochat: run {tag}", f"Written {time.strftime('%Y-%m-%d %H:%M')}."]
    parts += summary_section(tag, chats) + cost_section(tag, price) + talk_section(tag)
    parts += tokenizer_section() + training_section("base", tag, folder) + (core_section(tag, base) if base else [])
    for source in ("mid", "sft", "rl"):
        parts += training_section(source, tag, folder)
    parts += chat_section(chats)
    parts += ["## Environment", table(["", ""], list(machine().items()))]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(text)
    (folder / "report.html").write_text(to_html(text, folder, f"nanochat: run {tag}"))
    return folder


def to_html(text: str, folder: Path, title: str) -> str:
    """One page by itself: pictures are inside."""
    import markdown  # slow to import

    body = markdown.markdown(text, extensions=["tables", "fenced_code"])

    def inline(match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="([\w.-]+\.png)"', inline, body)
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">' \
           f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"


def reset() -> None:
    """Forget all reports and stage times: the clock starts now. Checkpoints and results stay."""
    root = get_base_dir()
    shutil.rmtree(root / "report", ignore_errors=True)
    for times in root.glob("logs/*/times.txt"):
        times.unlink()
    (root / "report").mkdir()
    (root / "report" / "start.json").write_text(json.dumps({"time": time.time()}))


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("generate", "reset"), help="write the report; or start the clock anew")
    parser.add_argument("-g", "--model-tag", default=None, help="which run; the most recent one when left out")
    parser.add_argument("--price", type=number(0), default=None, help="of the machine, dollars an hour")
    args = parser.parse_args(argv)
    if args.command == "reset":
        reset()
        print0(f"reset: reports and stage times in {get_base_dir()} are gone, the clock starts now")
        return {}
    folder = generate(find_run("base", args.model_tag).name, args.price)
    summary = (folder / "report.md").read_text().split("## Summary")[1].split("##")[0].strip()
    print0(f"{summary}\nreport: {folder / 'report.html'} (one file, to be sent around) and report.md")
    return {"folder": str(folder)}


if __name__ == "__main__":
    run_script(main)
