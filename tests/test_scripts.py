"""The scripts as a person runs them: every wrong input is one line and exit code 2, before anything slow starts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import common
from nanochat.chat_eval import evaluate_task
from nanochat.common import UserError
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_eval, base_train, chat_cli, chat_eval, chat_sft, infer_bench, tok_eval, tok_train

from tests.conftest import WORDS

REPO = Path(__file__).resolve().parents[1]
TINY = ["--depth=2", "--head-dim=32", "--aspect-ratio=32", "--max-seq-len=128", "--device-batch-size=2",
        "--total-batch-size=256", "--num-iterations=3", "--eval-tokens=2000", "--sample-every=-1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer, corpus_dir):
    """A base directory with a tokenizer, a base model and an SFT model, made by the scripts."""
    patch = pytest.MonkeyPatch()
    base = tmp_path_factory.mktemp("trained")
    patch.setenv("NANOCHAT_BASE_DIR", str(base))
    patch.setenv("NANOCHAT_DATA_DIR", str(corpus_dir))
    (base / "base_data_builtin").mkdir()
    (base / "base_data_builtin" / "words.txt").write_text("\n".join(a + b[:3] for a in WORDS for b in WORDS[:6]))
    assert tok_train.main(["--vocab-size=600"])["vocab_size"] == 600
    assert base_train.main([*TINY, "--sample-every=3"])["step"] == 3
    assert chat_sft.main(["--num-iterations=3", "--eval-rows=16", "--spelling-rows=50"])["step"] == 3
    yield base
    patch.undo()


def test_every_stage_runs(trained, capsys, monkeypatch):
    results = base_eval.main(["--split-tokens=2000", "--device-batch-size=4", "--max-new-tokens=4"])
    assert results["tag"] == "d2" and 1 < results["val_bpb"] < 10 and len(results["samples"]) == 6
    accuracies = chat_eval.main(["-a", "SpellingBee,SimpleSpelling", "-x", "8", "-m", "8"])
    assert set(accuracies) == {"SpellingBee", "SimpleSpelling"}
    (table,) = (trained / "chat_eval").glob("sft_d2_*.json")
    assert json.loads(table.read_text())["tasks"]["SpellingBee"]["total"] == 8 and not list(table.parent.glob("*.unfinished*"))
    table = tok_eval.main([])
    korean, tokenizer = tok_eval.SAMPLES["korean"], RustBPETokenizer.from_directory(trained / "tokenizer")
    assert table["nanochat"]["korean"] == len(korean.encode()) / len(tokenizer.encode(korean))
    assert tok_train.main(["--vocab-size=600", "--resume"])["seconds"] == 0.0
    first = chat_cli.main(["-p", "Hello", "--seed", "1", "-m", "6"])["answer"]
    assert chat_cli.main(["-p", "Hello", "--seed", "1", "-m", "6"])["answer"] == first
    out = capsys.readouterr().out
    assert re.search(r"^SpellingBee +\d+ +8 ", out, re.MULTILINE) and "stopped at --max-tokens=6" in out


def test_the_mixture_is_printed_with_its_rows(trained, capsys):
    chat_sft.main(["--num-iterations=1", "--eval-rows=16", "--spelling-rows=50", "--identity-epochs=3", "--mmlu-epochs=0"])
    out = capsys.readouterr().out
    assert "built-in conversations stand in" in out
    assert "SimpleSpelling" in out and "50 rows x 1" in out and "rows x 3" in out


def test_an_interrupted_chat_eval_goes_on(trained, capsys, monkeypatch):
    flags, seen = ["-a", "SpellingBee,SimpleSpelling", "-x", "8", "-m", "8"], []

    def interrupted(model, tokenizer, task, runtime, **options):
        seen.append(task)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate_task(model, tokenizer, task, runtime, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chat_eval, "evaluate_task", interrupted)
        chat_eval.main(flags)
    capsys.readouterr()
    assert len(chat_eval.main(flags)) == 2
    out = capsys.readouterr().out
    assert "finished already: SpellingBee" in out and "SpellingBee ..." not in out and "SimpleSpelling ..." in out


def test_chatcore_during_finetuning(trained, capsys):
    chat_sft.main(["--num-iterations=2", "--eval-rows=16", "--spelling-rows=50", "--builtin", "--chatcore-every=2",
                   "--chatcore-max-sample=4", "--model-tag=d2"])
    assert re.search(r"step 2 \| ChatCORE - \| SpellingBee \d", capsys.readouterr().out)


def test_metrics_file(trained):
    lines = [json.loads(line) for line in (trained / "base_checkpoints" / "d2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2]
    assert {"loss", "lr_multiplier", "tokens_per_s", "memory_bytes", "epoch"} <= lines[0].keys()
    assert lines[-1]["step"] == 3 and lines[-1]["val_bpb"] > 0


def test_a_fresh_run_keeps_the_earlier_one(trained, capsys):
    base_train.main([*TINY, "--model-tag=again"])
    base_train.main([*TINY, "--model-tag=again"])
    assert "again.previous1" in capsys.readouterr().out
    assert (trained / "base_checkpoints" / "again.previous1" / "model_000003.pt").exists()


def test_a_run_that_does_not_start_leaves_the_earlier_one_in_its_place(trained, monkeypatch):
    import wandb

    def refuses(**settings):
        raise wandb.errors.UsageError("No API key configured")

    base_train.main([*TINY, "--model-tag=kept"])
    monkeypatch.setattr(wandb, "init", refuses)
    with pytest.raises(UserError, match="wandb does not start .No API key"):
        base_train.main([*TINY, "--model-tag=kept", "--run=trial"])
    assert (trained / "base_checkpoints" / "kept" / "model_000003.pt").exists()


def test_a_model_that_diverged_is_not_called_done(trained, capsys):
    with pytest.raises(UserError, match="broken"):
        base_train.main([*TINY, "--model-tag=diverged", "--matrix-lr=1e30", "--embedding-lr=1e30"])
    assert "done:" not in capsys.readouterr().out


def test_a_replaced_tokenizer_is_kept(trained, tmp_path, monkeypatch, capsys):
    base = tmp_path / "copy"
    shutil.copytree(trained, base)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    tok_train.main(["--vocab-size=500"])
    kept = re.search(r"kept as (tokenizer_\w{8}\.json)", capsys.readouterr().out)[1]
    with pytest.raises(UserError, match=kept):
        chat_cli.main(["-p", "Hello"])
    (base / "tokenizer" / kept).rename(base / "tokenizer" / "tokenizer.json")
    chat_cli.main(["-p", "Hello", "-m", "2"])


@pytest.mark.parametrize("flags,match", [
    (["--max-seq-len=100000000", "--num-iterations=-1", "--total-batch-size=-1"], "target-param-data-ratio"),
    (["--depth=0"], "depth"), (["--depth=-1"], "depth"), (["--num-iterations=0"], "num-iterations"),
    (["--max-seq-len=1"], "max-seq-len"), (["--window-pattern=XYZ"], "window pattern"), (["--head-dim=63"], "head dim 63"),
    (["--matrix-lr=-0.1"], "matrix-lr"), (["--embedding-lr=nan"], "embedding-lr"), (["--scalar-lr=inf"], "scalar-lr"),
    (["--device-type=gpu"], "device-type"), (["--device-batch-size=3"], "does not divide"), (["--device-batch-size=0"], "batch"),
    (["--total-batch-size=1000"], "no multiple"), (["--data-dir=/nowhere"], "does not exist"), (["--depht=3"], "depht"),
    (["--warmdown-ratio=1.5"], "warmdown"), (["--resume=7", "--model-tag=none"], "there are: none"),
    (["--resume", "--max-seq-len=64"], "sequence_len"), (["--resume", "--depth=3", "--model-tag=d2"], "n_layer"),
    (["--resume", "--num-iterations=9"], "num-iterations"), (["--resume", "--matrix-lr=0.5"], "matrix-lr")])
def test_base_train_refuses(trained, monkeypatch, flags, match):
    monkeypatch.setattr(base_train, "compute_init", lambda *a: pytest.fail("the device was touched"))
    with pytest.raises(UserError, match=match):
        base_train.main([*TINY, *flags])


def test_missing_things_are_named(base_dir, monkeypatch, tmp_path, tokenizer):
    monkeypatch.setenv("NANOCHAT_DTYPE", "int8")
    with pytest.raises(UserError, match="float32"):
        base_train.main(TINY)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    for main in (base_eval.main, chat_sft.main):
        with pytest.raises(UserError, match="scripts.base_train"):
            main([])
    for main in (chat_eval.main, chat_cli.main):
        with pytest.raises(UserError, match="scripts.chat_sft"):
            main(["-p", "hi"] if main is chat_cli.main else ["-a", "SpellingBee"])
    with pytest.raises(UserError, match="no corpus"):
        monkeypatch.delenv("NANOCHAT_DATA_DIR")
        base_train.main(TINY)
    (base_dir / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tok_train"):
        base_train.main(TINY)


def test_truncated_shard(trained, corpus_dir, tmp_path):
    for name in ("a.parquet", "val.parquet"):
        (tmp_path / name).write_bytes((corpus_dir / name).read_bytes())
    (tmp_path / "a.parquet").write_bytes((corpus_dir / "a.parquet").read_bytes()[:-500])
    with pytest.raises(UserError, match="truncated"):
        base_train.main([*TINY, f"--data-dir={tmp_path}"])


def test_tokenizer_of_another_run(trained, monkeypatch, tmp_path, corpus_dir):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(trained, other)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other))
    tok_train.main(["--vocab-size=500"])
    for main, argv in ((base_eval.main, []), (chat_cli.main, ["-p", "hi"]), (chat_sft.main, []),
                       (base_train.main, [*TINY, "--resume"])):
        with pytest.raises(UserError, match="tokenizer"):
            main(argv)


def test_conversation_file_with_wrong_roles(trained, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "human", "content": "hi"}]}\n')
    with pytest.raises(UserError, match="line 1.*human"):
        chat_sft.main(["--num-iterations=1", f"--conversations={path}"])


def test_fp8_is_refused_where_impossible(trained):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("this GPU can do fp8")
    with pytest.raises(UserError, match="fp8"):
        base_train.main([*TINY, "--model-tag=f8", "--fp8"])


@pytest.mark.parametrize("arguments", [["scripts.base_train", "--depth=0"], ["scripts.tok_train", "--vocab-size=3"],
                                       ["scripts.chat_eval", "-a", "Nothing"], ["scripts.chat_cli", "-p", " "],
                                       ["nanochat.dataset", "-n", "x"], ["dev.gen_synthetic_data", "--knowledge=/none"]])
def test_one_line_and_exit_code_2(arguments, tmp_path):
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_shell_script_stops_at_a_failed_stage(tmp_path):
    if not (REPO / ".venv" / ".nanochat-setup").exists():
        pytest.skip("runs/setup.sh has not been run here")
    done = subprocess.run(["bash", "runs/runcpu.sh"], cwd=REPO, capture_output=True, text=True,
                          env=os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path), "NANOCHAT_DATA_DIR": "/nowhere"})
    assert done.returncode == 2 and 'stage "corpus" failed' in done.stderr and "tok_train" not in done.stdout


def test_every_flag_has_help():
    for module in (tok_train, tok_eval, base_train, base_eval, chat_sft, chat_eval, chat_cli):
        done = subprocess.run([sys.executable, "-m", module.__name__, "--help"], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0 and module.__doc__.splitlines()[0] in " ".join(done.stdout.split())


def test_conversation_in_the_terminal(trained, monkeypatch, capsys):
    lines = iter(["Hello", "/clear", "/what", "", "Hi again", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    chat_cli.main(["-m", "5", "--seed", "3"])
    out = capsys.readouterr().out
    assert out.count("nanochat: ") == 2 and "(forgotten)" in out and "unknown command /what" in out


def test_tool_calls_in_the_terminal():
    out = []
    printer = chat_cli.Printer(out.append)
    for piece in [("text", "It is "), ("python", ""), ("python", "1+"), ("python", "1"), ("text", ""),
                  ("python_output", ""), ("python_output", "2"), ("text", ""), ("text", " I"), ("text", " think"),
                  ("python", ""), ("python", "x"), ("text", "")]:
        printer.push(*piece)
    printer.close()
    assert "".join(out) == "It is [1+1 = 2] I think[x]"


def test_an_answer_can_be_interrupted(trained, capsys, monkeypatch):
    step = chat_cli.Engine.step

    def interrupting(engine):
        if engine.steps == 3:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(chat_cli.Engine, "step", interrupting)
    chat_cli.main(["-p", "Hello", "--seed", "1", "-t", "2"])
    assert capsys.readouterr().out.endswith("\n[stopped]\n")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_ctrl_c_while_pytorch_is_loaded():
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_cli"], cwd=REPO, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        pass
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == -signal.SIGINT


def test_full_context_is_told(trained, tokenizer, capsys):
    turns = [{"role": role, "content": "word " * 15} for _ in range(10) for role in ("user", "assistant")]
    messages = [*turns, {"role": "user", "content": "and now?"}]
    prompt, kept, tokens = tokenizer.fit_conversation(messages, 100)
    assert 1 < len(kept) < 21 and kept == messages[-len(kept):] and len(kept) % 2
    assert prompt == tokenizer.render_for_completion({"messages": kept}) and len(prompt) == tokens <= 100
    longer = tokenizer.render_for_completion({"messages": messages[-len(kept) - 2:]})
    assert len(longer) > 100  # no more than needed went
    prompt, kept, tokens = tokenizer.fit_conversation([{"role": "user", "content": "word " * 300}], 50)
    assert len(prompt) == 50 and prompt[0] == tokenizer.get_bos_token_id() and tokens > 300
    assert tokenizer.fit_conversation([{"role": "user", "content": "word"}], 1)[0] == prompt[:1]
    chat_cli.main(["-p", "word " * 300, "-m", "5"])
    assert "only its end is read" in capsys.readouterr().out


def test_devices_and_dtypes(monkeypatch):
    runtime = common.compute_init("cpu")
    assert runtime.device.type == "cpu" and runtime.dtype == torch.float32 and runtime.dtype_reason == "NANOCHAT_DTYPE"
    monkeypatch.delenv("NANOCHAT_DTYPE")
    assert common.compute_init("cpu").dtype in (torch.float32, torch.bfloat16)
    assert common.compute_init("cpu", torch.float16).dtype == torch.float16
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no such device"):
            common.compute_init("cuda")


def test_infer_bench(tmp_path, capsys):
    report = infer_bench.main(["--depth=1", "--max-seq-len=128", "--batch-sizes=2,1,2", "--context-lengths=20", "--max-new-tokens=12",
                               "--json", str(tmp_path / "table.json")])
    assert [r["batch"] for r in report["results"]] == [2, 1, 2] and report["results"][0]["x batch 1"] is None
    first, alone, last = json.loads((tmp_path / "table.json").read_text())["results"]
    assert last["x batch 1"] == pytest.approx(last["decode tok/s"] / alone["decode tok/s"])
    assert 0 < alone["share"] and alone["GB/s"] * 1e9 > 50 * alone["decode tok/s"] * 128  # at least the head's 32,768 rows
    assert len(capsys.readouterr().out.splitlines()) == 7
    for flags, told in ((["-g", "d12"], "with -i"), (["--json", "/nowhere/x.json"], "nowhere"), (["--context-lengths=4000"], "do not fit"),
                        (["--batch-sizes=0"], "at least 1")):
        with pytest.raises(UserError, match=told):
            infer_bench.main([*flags, "--depth=1", "--max-seq-len=128"])
