"""What researchers use: repackaged data, tables of many runs, the scaling notebook, the report."""

import csv
import json
import random
import subprocess
from pathlib import Path

import matplotlib
import pyarrow.parquet as pq
import pytest

from dev import collect_runs, repackage_data_reference
from nanochat import report
from nanochat.common import UserError
from nanochat.dataset import DocumentReader, find_corpus, write_parquet
from scripts import base_eval, base_train, chat_eval, chat_rl, chat_sft, tok_eval, tok_train

REPO = Path(__file__).resolve().parents[1]
TINY = ["--depth=2", "--head-dim=32", "--aspect-ratio=32", "--max-seq-len=128", "--device-batch-size=2", "--total-batch-size=256",
        "--eval-tokens=512", "--sample-every=-1"]


# --- repackaging --------------------------------------------------------------------------------------------------


def repackaged(folder: Path, *flags) -> dict:
    return repackage_data_reference.main(["--output", str(folder), "--buckets", "7", *flags])


def test_repackaging_keeps_every_document_and_shuffles_all_of_them(tmp_path):
    rng = random.Random(0)
    texts = [f"{i} " + "word " * rng.randrange(1, 60) for i in range(1000)]
    for part in range(3):
        write_parquet(tmp_path / "in" / f"{part}.parquet", texts[part::3])
    chars = sum(map(len, texts))
    results = repackaged(tmp_path / "out", "--files", str(tmp_path / "in" / "*.parquet"), "--shard-chars", str(chars // 4))
    assert results["documents"] == 1000 and results["chars"] == chars == sum(results["shards"])
    assert len(results["shards"]) == 4 and max(results["shards"]) - min(results["shards"]) < 700
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet", "val.parquet"]
    corpus = find_corpus(str(tmp_path / "out"))
    reader = DocumentReader((*corpus.train, *corpus.val))
    read = reader.read(0, reader.num_documents)
    assert sorted(read) == sorted(texts)
    numbers = [int(text.split()[0]) for text in read]
    mean_distance = sum(abs(a - b) for a, b in zip(numbers, numbers[1:])) / 999
    assert mean_distance == pytest.approx(1000 / 3, rel=0.1)  # that of random neighbours
    metadata = pq.ParquetFile(corpus.train[0]).metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD" and metadata.row_group(0).num_rows <= 256
    again = repackaged(tmp_path / "again", "--files", str(tmp_path / "in" / "*.parquet"), "--shard-chars", str(chars // 4))
    assert again == results and (tmp_path / "again" / "val.parquet").read_bytes() == (tmp_path / "out" / "val.parquet").read_bytes()


def test_repackaging_jsonl_and_its_mistakes(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(9)) + '{"body": ""}\n')
    flags = ["--files", str(tmp_path / "a.jsonl")]
    assert repackaged(tmp_path / "out", *flags, "--column", "body")["documents"] == 9
    for folder, wrong, message in (("out", flags, "not empty"), ("b", flags, "no column 'text'; there are: body"), ("c", [], "one of"),
                                   ("d", ["--files", str(tmp_path / "*.csv")], "expected files of one kind"),
                                   ("e", [*flags, "--dataset", "a/b"], "one of")):
        with pytest.raises(UserError, match=message):
            repackaged(tmp_path / folder, *wrong)
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    with pytest.raises(UserError, match="cannot be read"):
        repackaged(tmp_path / "f", "--files", str(tmp_path / "bad.jsonl"))


# --- many runs, one report ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, corpus_dir):
    """A base directory in which every stage has run once, and a second base run."""
    base = tmp_path_factory.mktemp("research")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setenv("NANOCHAT_DATA_DIR", str(corpus_dir))
        (base / "words_alpha.txt").write_text("\n".join(f"{a}{b}ter" for a in "abcdefghijkl" for b in "aeiou"))
        tok_train.main(["--vocab-size=600"])
        tok_eval.main([])
        base_train.main([*TINY, "--target-flops=2e9", "--model-tag=b"])
        base_train.main([*TINY, "--num-iterations=3", "--model-tag=a"])
        base_eval.main(["--eval=bpb,sample", "--split-tokens=512", "--max-new-tokens=4"])
        small = ["--builtin", "--num-iterations=2", "--eval-rows=16", "--spelling-rows=50"]
        chat_sft.main(["--stage=mid", *small])
        chat_sft.main(["--source=mid", *small])
        chat_eval.main(["-i", "mid", "-a", "SpellingBee", "-x", "4", "-m", "8"])
        chat_eval.main(["-i", "sft", "-a", "SpellingBee", "-x", "4", "-m", "8"])
        chat_rl.main(["--task=Arithmetic", "--num-iterations=2", "--examples-per-step=2", "--num-samples=2", "--max-new-tokens=8",
                      "--eval-examples=4", "--eval-samples=2"])
        yield base


def test_two_stages_of_finetuning(run):
    mid, sft = (json.loads((run / folder / "a" / "meta_000002.json").read_text()) for folder in ("mid_checkpoints", "chatsft_checkpoints"))
    base = json.loads((run / "base_checkpoints" / "a" / "meta_000003.json").read_text())
    assert mid["base"] == [3, base["environment"]["time"]] and sft["base"] == [2, mid["environment"]["time"]]
    assert (mid["user_config"]["mmlu_epochs"], sft["user_config"]["mmlu_epochs"]) == (3, 0)
    name = "lm_head.weight"
    assert sft["effective_lrs"][name] == pytest.approx(0.8 * mid["effective_lrs"][name]) == pytest.approx(0.64 * base["effective_lrs"][name])
    with pytest.raises(UserError, match="leave out one of them"):
        chat_sft.main(["--stage=mid", "--source=mid"])


def test_collected_runs(run, tmp_path):
    rows = collect_runs.main(["*", "--output", str(tmp_path / "runs.csv")])["rows"]
    assert [row["tag"] for row in rows] == ["a", "b"]
    with open(tmp_path / "runs.csv") as file:
        a, b = csv.DictReader(file)
    assert float(b["target_flops"]) == 2e9 and float(b["flops"]) == pytest.approx(2e9, rel=0.1)
    # depth 2, width 64, vocabulary 600 padded to 640: 12 C^2 a layer, one of them with a gate of 12 x 2, and the head
    assert int(a["scaling_parameters"]) == 2 * 12 * 64**2 + 24 + 640 * 64 and int(a["tokens"]) == 3 * 256
    metrics = [json.loads(line) for line in (run / "base_checkpoints" / "a" / "metrics.jsonl").read_text().splitlines()]
    assert float(a["val_bpb"]) == metrics[-1]["val_bpb"] and a["core"] == ""
    with pytest.raises(UserError, match="there are: a, b"):
        collect_runs.main(["nothing*", "--output", str(tmp_path / "none.csv")])


def test_report(run):
    logs = run / "logs" / "a"
    logs.mkdir(parents=True)
    (logs / "times.txt").write_text("2026-01-01T00:00:00Z pretraining 3000\n2026-01-01T01:00:00Z pretraining 600\n2026-01-01T01:00:00Z finetuning 60\n")
    (logs / "three_questions.log").write_text("You: Who are you?\nI am <b>nanochat</b> | 5 ``` 3\n")
    folder = Path(report.main(["generate", "--model-tag", "a", "--price", "20"])["folder"])
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for heading in ("Summary", "Time and cost", "A short talk", "Tokenizer", "Pretraining", "Base model, evaluated", "Midtraining", "Finetuning",
                    "Reinforcement learning", "Chat model, evaluated", "Environment"):
        assert f"\n## {heading}\n" in text and f"<h2>{heading}</h2>" in page, heading
    assert "| metric | base | mid | sft | rl |\n" in text and "**1:01:00**" in text and "$20.33" in text  # 3,660 s at $20 an hour
    for name in ("base.png", "mid.png", "sft.png", "rl.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in text
    assert page.count("data:image/png;base64,") == 4 and "<b>" not in page  # what a model wrote is no markup
    meta = json.loads((run / "base_checkpoints" / "a" / "meta_000003.json").read_text())
    assert f"| val_bpb | {meta['val_bpb']:.4f} | - | - | - |" in text
    report.main(["reset"])
    assert not folder.exists() and not (logs / "times.txt").exists() and (run / "base_checkpoints" / "a").exists()
    assert "since `report reset`" in (Path(report.main(["generate", "--model-tag", "a"])["folder"]) / "report.md").read_text()


def test_report_of_half_a_run(run):
    """A run that has had no more than pretraining."""
    text = (Path(report.main(["generate", "--model-tag", "b"])["folder"]) / "report.md").read_text()
    assert "## Pretraining" in text and "## Finetuning" not in text and "| metric | base |\n" in text
    with pytest.raises(UserError, match="no checkpoint 'c'"):
        report.main(["generate", "--model-tag", "c"])


# --- notebooks ----------------------------------------------------------------------------------------------------


def code_cells(name: str) -> str:
    cells = json.loads((REPO / "dev" / name).read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").replace("plt.show()", "plt.close()")


def test_scaling_notebook_finds_a_known_law(tmp_path, monkeypatch):
    """Runs that follow L = 0.7 + 30 / N^0.4 + 40 / D^0.35 exactly: the best size grows as C^(0.35 / 0.75)."""
    rows = []
    for budget in (1e12, 3e12, 1e13, 3e13):
        best = (budget / 6) ** (0.35 / 0.75) * ((30 * 0.4) / (40 * 0.35)) ** (1 / 0.75)  # where the derivative is 0
        for size in (best * factor for factor in (0.5, 0.8, 1.0, 1.3, 2.0)):
            tokens = budget / (6 * size)
            rows.append({"tag": "run", "depth": 2, "target_flops": budget, "flops": budget, "scaling_parameters": size, "tokens": tokens,
                         "tokens_per_parameter": tokens / size, "val_bpb": 0.7 + 30 / size**0.4 + 40 / tokens**0.35})
    with open(tmp_path / "sweep.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setenv("SCALING_CSV", str(tmp_path / "sweep.csv"))
    matplotlib.use("Agg")
    names: dict = {}
    exec(code_cells("scaling_analysis.ipynb"), names)
    assert names["a"] == pytest.approx(0.35 / 0.75, abs=0.01) and names["b"] == pytest.approx(0.4 / 0.75, abs=0.01)
    assert (names["alpha"], names["beta"]) == pytest.approx((0.4, 0.35), abs=0.011) and names["E"] == pytest.approx(0.7, abs=0.02)
    low, high = (float(names["samples"][:, 0, 0].min()), float(names["samples"][:, 0, 0].max()))
    assert low < names["a"] < high


@pytest.mark.parametrize("name", ["scaling_analysis.ipynb", "estimate_gpt3_core.ipynb"])
def test_notebooks_are_kept_with_outputs(name):
    """Every code cell has been run, in order, without an error, and no path of the machine is in it."""
    notebook = json.loads((REPO / "dev" / name).read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert "/home/" not in json.dumps(notebook) and "/tmp/" not in json.dumps(notebook)


def test_sweeps_stop_at_a_failed_run(tmp_path):
    """With a torchrun that knows one finished run and fails the next: the sweep names it and goes no further."""
    (tmp_path / "torchrun").write_text('#!/bin/bash\n[[ "$*" == *--depth=4* ]] && echo "base/m_d4 is finished already" && exit 0\n'
                                       'echo "error: $*" >&2; exit 3\n')
    (tmp_path / "python").write_text("#!/bin/bash\nexit 0\n")
    for program in ("torchrun", "python"):
        (tmp_path / program).chmod(0o755)
    script = (REPO / "runs" / "miniseries.sh").read_text().replace("source runs/setup.sh", "").replace("bash runs/setup.sh", "true")
    script = script.replace('cd "$(dirname "${BASH_SOURCE[0]}")/.."', f"cd {REPO}")
    done = subprocess.run(["bash", "-c", script, "miniseries", "--fp8"], capture_output=True, text=True, env={
        "PATH": f"{tmp_path}:/usr/bin:/bin", "NANOCHAT_BASE_DIR": str(tmp_path), "NAME": "m", "DEPTHS": "4 6 8", "NPROC_PER_NODE": "3"})
    assert done.returncode == 3 and 'stage "m_d6" failed' in done.stderr and "--fp8" in done.stderr
    assert "--nproc_per_node=3 -m scripts.base_train -- --depth=4 --model-tag=m_d4" in done.stdout and "m_d8" not in done.stdout
