"""CORE: GPT-2's published scores, the rendering of prompts, and batches that score like one by one."""

import csv
import json
import random

import numpy as np
import pytest
import torch

from dev.check_core import score_plainly
from nanochat import core_eval
from nanochat.choice_scoring import Question, make_batches, score_batch
from nanochat.common import UserError
from nanochat.core_eval import CoreEvaluation, CoreTask, core_metric, deal_out, evaluate_questions, render, to_question, verdict
from nanochat.gpt import GPTConfig, build_model
from nanochat.results import FinishedTasks
from tests.conftest import WORDS, needs_shared_data


def random_model(vocab_size=600, windows="SL", context=64):
    torch.manual_seed(3)
    config = GPTConfig(context, vocab_size, 3, 4, 2, 64, windows)
    model = build_model(config, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else parameter.size(-1) ** -0.5))
    return model.for_inference()


# --- published numbers ------------------------------------------------------------------------------------------------


def test_gpt2_published_scores():
    folder = needs_shared_data("eval_bundle")
    tasks = core_eval.load_tasks(folder)
    assert len(tasks) == 22
    for name, accuracies in core_eval.gpt2_scores(folder).items():
        with open(folder / f"openai-community-{name}.csv", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)][1:]
        centered = {label: float(value) for label, _, value in rows}
        for task in tasks:
            assert task.centered(accuracies[task.label]) == pytest.approx(centered[task.label], abs=5e-5)
        assert core_metric(tasks, accuracies) == pytest.approx(centered["CORE"], abs=5e-5)
    assert core_metric(tasks, accuracies) == pytest.approx(0.256525, abs=5e-5)


def test_all_of_the_bundle_can_be_rendered(tokenizer):
    folder = needs_shared_data("eval_bundle")
    for task in core_eval.load_tasks(folder):
        for question in core_eval.make_questions(task, tokenizer, 12, 512):
            assert all(0 < start < len(row) <= 512 for start, row in zip(question.starts, question.rows))
            assert 0 <= question.gold < len(question.rows) or task.kind == "language_modeling"


# --- prompts ----------------------------------------------------------------------------------------------------------

CHOICE = CoreTask("choice", "multiple_choice", None, 2, " ", 0.25)
SCHEMA = CoreTask("schema", "schema", None, 1, " ", 0.5)
LANGUAGE = CoreTask("language", "language_modeling", None, 1, "\nAnswer: ", 0.0)


def test_rendering():
    items = [{"query": f"q{i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2} for i in range(5)]
    first, second = random.Random(1234 + 3).sample([0, 1, 2, 4], 2)
    example = {i: f"q{i} {'ab'[i % 2]}{i}\n\n" for i in range(5)}
    assert render(CHOICE, items, 3) == [f"{example[first]}{example[second]}q3 a3", f"{example[first]}{example[second]}q3 b3"]
    assert render(CHOICE, items[:1], 0) == ["q0 a0", "q0 b0"]  # fewer items than shots
    items = [{"context_options": ["the cat", "the dog"], "continuation": "sat.", "gold": 1}, {
        "context_options": ["a", "b"], "continuation": "c", "gold": 0}]
    assert render(SCHEMA, items, 1) == ["the dog sat.\n\na c", "the dog sat.\n\nb c"]
    items = [{"context": " Who? ", "continuation": "Me"}, {"context": "Where? ", "continuation": "Here"}]
    assert render(LANGUAGE, items, 1) == ["Who?\nAnswer: Me\n\nWhere?\nAnswer:", "Who?\nAnswer: Me\n\nWhere?\nAnswer: Here"]


def rows(*lists):
    return [np.array(row, dtype=np.int32) for row in lists]


def test_what_is_scored():
    assert to_question(CHOICE, rows([1, 2, 3, 4], [1, 2, 5, 6, 7]), 1, None).starts == (2, 2)
    assert to_question(SCHEMA, rows([1, 2, 8, 9], [1, 3, 4, 8, 9]), 0, None).starts == (2, 3)
    assert to_question(LANGUAGE, rows([1, 2], [1, 2, 8, 9]), 0, None).starts == (2,)
    assert to_question(LANGUAGE, rows([1, 5], [1, 2, 8, 9]), 0, None).starts == (1,)  # the border falls inside a token
    cut = to_question(CHOICE, rows([1, 2, 3, 4], [1, 2, 5, 6, 7]), 1, 3)
    assert cut.starts == (1, 1) and [row.tolist() for row in cut.rows] == [[2, 3, 4], [5, 6, 7]]


# --- scoring ----------------------------------------------------------------------------------------------------------


def random_questions(count=40, seed=0, longest=150) -> list[Question]:
    """Of one to five rows, with long and short common beginnings."""
    rng = random.Random(seed)
    questions = []
    for _ in range(count):
        begin = [rng.randrange(600) for _ in range(rng.choice((1, 5, 30, longest)))]
        some = rows(*(begin + [rng.randrange(600) for _ in range(rng.randrange(1, 20))] for _ in range(rng.choice((1, 2, 5)))))
        questions.append(Question(tuple(some), tuple(rng.randrange(len(begin), len(row)) for row in some), 0))
    return questions


@pytest.mark.parametrize("windows", ["L", "S", "SSL"])
def test_batches_score_like_one_by_one(windows):
    model, questions = random_model(windows=windows), random_questions()  # prompts beyond the context and beyond windows
    plain = score_plainly(model, questions)
    assert any(question.shared for question in questions) and not all(question.shared for question in questions)
    for budget in (1, 300, 5000):
        batches = make_batches(questions, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(questions)))
        for batch in batches:
            for i, score in zip(batch, score_batch(model, [questions[i] for i in batch])):
                assert score.losses == pytest.approx(plain[i].losses, abs=2e-5) and score.hits == plain[i].hits
                assert verdict(CHOICE, questions[i], score) == verdict(CHOICE, questions[i], plain[i])


def test_hits_are_told(monkeypatch):
    """A continuation that the model itself chose is hit; with one token changed it is not."""
    model = random_model()
    row = [1, 2, 3]
    with torch.inference_mode():
        for _ in range(5):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    wrong = [*row[:-1], (row[-1] + 1) % 600]
    scores = score_batch(model, [Question(tuple(rows(row)), (3,), 0), Question(tuple(rows(wrong)), (3,), 0)])
    assert [score.hits for score in scores] == [(True,), (False,)]


def test_batches_and_their_owners():
    questions = random_questions(60)
    for batch in make_batches(questions, 2000):
        shared = [questions[i].shared for i in batch]
        wide = max(max(map(len, questions[i].rows)) - questions[i].shared for i in batch)
        assert len(batch) == 1 or len(batch) * max(shared) + sum(len(questions[i].rows) for i in batch) * wide <= 2000
    owners = deal_out([7, 5, 4, 3, 3, 2], 3)
    assert sorted(sum(c for c, o in zip([7, 5, 4, 3, 3, 2], owners) if o == rank) for rank in range(3)) == [7, 8, 9]


def test_ranks_share_the_work(cpu, monkeypatch):
    """Every question is scored by exactly one rank, and the sum over ranks is what one process gets."""
    model, questions = random_model(), random_questions(30)
    alone = evaluate_questions(CHOICE, questions, model, cpu, budget=400)
    parts = []
    for rank in range(3):
        class Rank:
            device, world_size = cpu.device, 3

            def sum_tensor(self, values):
                parts.append(values)
                return values
        Rank.rank = rank
        evaluate_questions(CHOICE, questions, model, Rank(), budget=400)
    total = sum(parts)
    assert total[0].tolist() == [float(r) for r in alone.right] and total[1].tolist() == alone.chosen


# --- the whole evaluation ---------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A small bundle of one task of each kind."""
    folder = tmp_path / "bundle"
    (folder / "eval_data" / "x").mkdir(parents=True)
    rng = random.Random(0)

    def word():
        return rng.choice(WORDS)

    items = {
        "choice": [{"query": f"{word()} {word()}", "choices": [word(), word(), word(), word()], "gold": i % 4} for i in range(30)],
        "schema": [{"context_options": [word(), word()], "continuation": f"{word()} {word()}", "gold": i % 2} for i in range(20)],
        "language": [{"context": f"{word()} {word()}", "continuation": word()} for _ in range(10)],
    }
    entries = []
    for task in (CHOICE, SCHEMA, LANGUAGE):
        (folder / "eval_data" / "x" / f"{task.label}.jsonl").write_text("\n".join(map(json.dumps, items[task.label])))
        entries.append({"label": task.label, "dataset_uri": f"x/{task.label}.jsonl", "num_fewshot": [task.shots],
                        "icl_task_type": task.kind, "continuation_delimiter": task.delimiter})
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,25\nschema,50\nlanguage,0\n")
    for name in core_eval.GPT2_SIZES:
        (folder / f"openai-community-{name}.csv").write_text("Task, Accuracy, Centered\nchoice, 0.5, 0.33\nschema, 0.75, 0.5\n"
                                                             "language, 0.1, 0.1\nCORE, , 0.31\n")
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(folder))
    return folder


def test_an_interrupted_evaluation_goes_on(bundle, tokenizer, cpu, tmp_path):
    model, seen = random_model(tokenizer.get_vocab_size()), []

    def finished(settings):
        return FinishedTasks(tmp_path / "unfinished.jsonl", settings, True)

    def interrupted(result):
        records.add(result.label, vars(result))
        seen.append(result.label)
        if len(seen) == 2:
            raise KeyboardInterrupt

    records = finished({"n": 1})
    evaluation = CoreEvaluation(tokenizer, 15)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(model, cpu, {}, interrupted)
    with open(tmp_path / "unfinished.jsonl", "a") as file:
        file.write('{"torn')
    again = finished({"n": 1})
    assert set(again.done) == {"choice", "schema"}
    done = {label: core_eval.TaskResult(**result) for label, result in again.done.items()}
    results = evaluation.run(model, cpu, done, lambda result: seen.append(result.label))
    assert seen == ["choice", "schema", "language"]
    whole = CoreEvaluation(tokenizer, 15).run(model, cpu)
    assert {k: (r.accuracy, r.right) for k, r in results.items()} == {k: (r.accuracy, r.right) for k, r in whole.items()}
    assert evaluation.metric(results) == pytest.approx(sum(r.centered for r in whole.values()) / 3)
    assert finished({"n": 2}).done == {}


def test_a_broken_bundle_is_told(bundle, tokenizer):
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,25\n")
    with pytest.raises(UserError, match="not whole"):
        CoreEvaluation(tokenizer)


def test_huggingface_models(tmp_path, bundle, base_dir, capsys):
    transformers = pytest.importorskip("transformers", reason="needs transformers (uv pip install transformers)")
    tokenizers = pytest.importorskip("tokenizers")
    from nanochat.huggingface import load_huggingface, score_huggingface
    from scripts import base_eval

    vocabulary = {character: i for i, character in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(tmp_path / "hf")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(vocabulary), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    model, tokenizer, limit = load_huggingface(str(tmp_path / "hf"), torch.device("cpu"), torch.float32)
    assert limit == 64 and tokenizer.encode(["ab"], tokenizer.get_bos_token_id()) == [[256, vocabulary["a"], vocabulary["b"]]]
    questions = [Question(tuple(row % len(vocabulary) for row in q.rows), q.starts, 0) for q in random_questions(12, longest=40)]
    for question, score in zip(questions, score_huggingface(model, questions)):
        for row, start, loss, hit in zip(question.rows, question.starts, score.losses, score.hits):
            with torch.no_grad():
                logits = model(torch.tensor(row[None].astype("int64"))).logits[0, start - 1:-1].log_softmax(dim=-1)
            target = torch.tensor(row[start:].astype("int64"))
            assert loss == pytest.approx(-logits.gather(1, target[:, None]).mean().item(), abs=1e-4)
            assert hit == bool((logits.argmax(dim=-1) == target).all())
    result = base_eval.main(["--hf-path", str(tmp_path / "hf"), "--max-per-task", "8", "--per-example", str(tmp_path / "each.jsonl")])
    out = capsys.readouterr().out
    assert "cut to their last 64 tokens" in out and -1 < result["core"] < 1
    assert len((tmp_path / "each.jsonl").read_text().splitlines()) == 24
    with pytest.raises(UserError, match="causal language model"):
        base_eval.main(["--hf-path", str(tmp_path / "nowhere")])


def test_base_eval_and_base_train(bundle, base_dir, capsys):
    from scripts import base_eval, base_train

    base_train.main(["--depth=2", "--head-dim=32", "--aspect-ratio=32", "--max-seq-len=64", "--device-batch-size=2",
                     "--total-batch-size=128", "--num-iterations=2", "--eval-tokens=500", "--sample-every=-1",
                     "--core-metric-every=2", "--core-metric-max-per-task=12"])
    assert "| CORE " in capsys.readouterr().out
    metrics = [json.loads(line) for line in (base_dir / "base_checkpoints" / "d2" / "metrics.jsonl").read_text().splitlines()]
    result = base_eval.main(["--eval=core", "--max-per-task=12", "--long-prompts=trim"])
    assert metrics[-1]["core"] == pytest.approx(result["core"])
    table = list(csv.reader(open(base_dir / "base_eval" / "d2_000002.csv")))
    assert table[0] == ["task", "accuracy", "centered", "GPT-2 124M", "GPT-2 355M", "GPT-2 774M", "GPT-2 1558M"]
    assert table[-1][0] == "CORE" and float(table[-1][2]) == pytest.approx(result["core"], abs=1e-6)
    assert float(table[-1][3]) == pytest.approx((0.25 / 0.75 + 0.5 + 0.1) / 3, abs=1e-6)
    assert not list((base_dir / "base_eval").glob("*.unfinished*"))
    with pytest.raises(UserError, match="--eval core"):
        base_eval.main(["--eval=bpb", "--hf-path=x"])
