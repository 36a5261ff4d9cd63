"""The tasks: slicing, mixing, answers judged as numbers, data from a mirror, and the generators behind them."""

import json
import random
from decimal import Decimal

import pytest
import torch

from nanochat import chat_eval, synthetic
from nanochat.calculator import calculate
from nanochat.chat_eval import evaluate_task
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig, build_model
from tasks.arc import ARC
from tasks.builtin import GENERATORS, BuiltinChat, Identity
from tasks.common import LetterTask, TaskMixture, TaskSequence, render_mc
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, answer_parts, final_number
from tasks.mmlu import MMLU
from tasks.registry import parse_task_names
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tests.conftest import WORDS, needs_shared_data


def test_slicing():
    whole = BuiltinChat("facts", 20)
    part = BuiltinChat("facts", 20, start=3, stop=15, step=4)
    assert len(part) == 3 and [part[i] for i in range(3)] == [whole[3], whole[7], whole[11]]
    with pytest.raises(IndexError):
        part[3]


def test_mixture_and_sequence():
    a, b = BuiltinChat("facts", 5), BuiltinChat("arithmetic", 3)
    def key(chat):
        return json.dumps(chat)

    everything = sorted([key(t[i]) for t in (a, a, b) for i in range(len(t))])
    mixture = TaskMixture([a, a, b])
    order = [key(mixture[i]) for i in range(13)]
    assert sorted(order) == everything and order == [key(TaskMixture([a, a, b])[i]) for i in range(13)]
    assert order != [key(TaskMixture([a, a, b], seed=1)[i]) for i in range(13)]
    sequence = TaskSequence([a, b])
    assert len(sequence) == 8 and sequence[4] == a[4] and sequence[5] == b[0]


def test_multiple_choice_letters_are_tokens_of_their_own(tokenizer):
    text = render_mc("What is hot?", ["A", "B"], ["ice", "fire"])
    assert text.startswith("What is hot?\n- ice=A\n- fire=B\n")
    for letter, choice in (("A", "ice"), ("B", "fire")):
        ids = tokenizer.encode(f"- {choice}={letter}\n")
        assert tokenizer.encode(letter)[0] in ids


@pytest.mark.parametrize("text,number", [
    ("#### 5", "5"), ("#### 5.00", "5"), ("so\n#### $1,250", "1250"), ("#### 3\nno\n#### 4", "4"), ("#### -7 apples", "-7"),
    ("####12", "12"), ("#### .5", "0.5"), ("5", None), ("#### none", None), ("", None)])
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_answers_become_tool_calls():
    parts = answer_parts("He has 48/2 = <<48/2=24>>24 clips.\n#### 24")
    assert [p["type"] for p in parts] == ["text", "python", "python_output", "text"]
    assert [p["text"] for p in parts] == ["He has 48/2 = ", "48/2", "24", "24 clips.\n#### 24"]


def test_spelling_train_and_test_are_disjoint():
    words = [f"{a}{b}" for a in WORDS for b in WORDS][:600]
    train, test = (SpellingBee(300, split, words) for split in ("train", "test"))
    assert set(train.words).isdisjoint(test.words) and len(set(train.words) | set(test.words)) == 600
    assert set(SimpleSpelling(9, "train", words).words) == set(train.words)
    for i in range(300):
        chat = test[i]
        question, parts = (m["content"] for m in chat["messages"])
        text, call, output, end = (p["text"] for p in parts)
        word = next(w for w in test.words if f" {w}." in text.replace("'", " ").replace('"', " ").replace(":", ".")
                    or f" {w}:" in text or f"'{w}'" in text or f'"{w}"' in text)
        letter = call[-3]
        assert word in question and letter in question
        assert output == str(word.count(letter)) == end.split("#### ")[1] and ", ".join(word) in text
        assert test.evaluate(chat, f"#### {output}.0") and not test.evaluate(chat, f"#### {int(output) + 1}")
    assert test[5] == SpellingBee(300, "test", words)[5]


def test_generated_tool_calls_are_right():
    rng = random.Random(0)
    for kind in ("arithmetic", "word problems"):
        for _ in range(300):
            parts = GENERATORS[kind](rng)["messages"][1]["content"]
            assert calculate(parts[1]["text"]) == parts[2]["text"] == parts[3]["text"].split("#### ")[1]


def test_identity_uses_the_knowledge_file():
    topics = synthetic.read_knowledge()
    assert len(topics) >= 15 and all(len(t["ask"]) >= 5 and len(t["tell"]) >= 2 for t in topics.values())
    tells = {tell for t in topics.values() for tell in t["tell"]} | {tell for _, ts in synthetic.SMALL_TALK for tell in ts}
    task = Identity(200)
    for i in range(200):
        assert all(m["content"] in tells for m in task[i]["messages"][1::2])
    assert len({json.dumps(task[i]) for i in range(200)}) > 180


def test_knowledge_file_errors(tmp_path):
    path = tmp_path / "knowledge.md"
    for text in ("- ask: what?", "## name\n- ask: who?", "nothing"):
        path.write_text(text)
        with pytest.raises(UserError):
            synthetic.read_knowledge(path)
    with pytest.raises(UserError):
        synthetic.read_knowledge(tmp_path / "absent.md")


def test_customjson(tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps(messages) + "\n")
    task = CustomJSON(path)
    assert len(task) == 2 and task[0] == task[1] == {"messages": messages}
    for line in ('{"messages": [{"role": "robot", "content": "x"}]}', "not json", "{}", "[]", '[{"role": "user", "content": "a"}]'):
        path.write_text(json.dumps(messages) + "\n" + line + "\n")
        with pytest.raises(UserError, match="line 2"):
            CustomJSON(path)
    path.write_text("")
    with pytest.raises(UserError, match="no conversation"):
        CustomJSON(path)


def test_task_names():
    assert parse_task_names("GSM8K|ARC-Easy") == parse_task_names("GSM8K,ARC-Easy") == ["GSM8K", "ARC-Easy"]
    assert "SpellingBee" in parse_task_names(None)
    with pytest.raises(UserError, match="ARC-Easy"):
        parse_task_names("GSM9K")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The shared data laid out as a mirror directory."""
    data = needs_shared_data()
    layout = {"cais/mmlu/all": data / "mmlu" / "all", "openai/gsm8k/main": data / "gsm8k",
              "allenai/ai2_arc/ARC-Easy": data / "arc" / "ARC-Easy",
              "HuggingFaceTB/smol-smoltalk/default": data / "smoltalk-like"}
    for name, source in layout.items():
        target = tmp_path / "mirror" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(tmp_path / "mirror"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def test_tasks_from_a_mirror(mirror, tokenizer):
    from tasks.smoltalk import SmolTalk

    arc, mmlu, gsm8k, smoltalk = ARC("ARC-Easy", "test"), MMLU("test"), GSM8K("test"), SmolTalk("test")
    assert (len(arc), len(mmlu), len(gsm8k), len(smoltalk)) == (2376, 14042, 1319, 1200)
    for task in (arc, mmlu):
        chat = task[7]
        assert chat["messages"][1]["content"] in chat["letters"]
        assert task.evaluate(chat, chat["messages"][1]["content"]) and not task.evaluate(chat, "Z")
    for i in range(50):
        parts = gsm8k[i]["messages"][1]["content"]
        assert gsm8k.evaluate(gsm8k[i], parts[-1]["text"])
    for task in (arc, mmlu, gsm8k, smoltalk):
        ids, mask = tokenizer.render_conversation(task[3], None)
        assert len(ids) == len(mask) and sum(mask) > 0
    with pytest.raises(UserError, match="missing"):
        ARC("ARC-Challenge", "test")


def test_offline_without_a_mirror_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="NANOCHAT_DATASETS_DIR"):
        GSM8K("test")


class Letters(LetterTask):
    def num_examples(self):
        return 37

    def get_example(self, index):
        rng = random.Random(index)
        return self.conversation("word " * rng.randrange(1, 20), list("ABC"), ["x", "yy", "zzz"], rng.choice("ABC"))


def test_categorical_evaluation_equals_one_by_one(tokenizer, cpu):
    torch.manual_seed(1)
    config = GPTConfig(sequence_len=256, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = build_model(config, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                p.normal_(std=0.3)
    model.for_inference()
    task, correct = Letters(), 0
    ids = [tokenizer.encode(letter)[0] for letter in "ABC"]
    for i in range(37):
        prompt = tokenizer.render_for_completion(task[i])
        with torch.no_grad():
            answer = "ABC"[model(torch.tensor([prompt]))[0, -1, ids].argmax()]
        correct += answer == task[i]["messages"][1]["content"]
    for batch in (1, 5, 64):
        result = evaluate_task(model, tokenizer, task, cpu, batch_size=batch)
        assert (result.correct, result.total) == (correct, 37)
    assert result.centered == pytest.approx((correct / 37 - 0.25) / 0.75)
    assert evaluate_task(model, tokenizer, task, cpu, max_problems=5).total == 5


def test_generative_evaluation_counts_right_answers(tokenizer, cpu):
    config = GPTConfig(sequence_len=128, vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    model = build_model(config, torch.device("cpu"), torch.float32).for_inference()

    class Lenient(BuiltinChat):
        def evaluate(self, conversation, response):
            return len(conversation["messages"][0]["content"]) % 2 == 0 and isinstance(response, str)

    task = Lenient("facts", 12)
    expected = sum(len(task[i]["messages"][0]["content"]) % 2 == 0 for i in range(12))
    engine = Engine(model, tokenizer)
    prompts = []
    engine.submit, submit = (lambda request: (prompts.append(len(request.prompt)), submit(request))[1]), engine.submit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_eval, "Engine", lambda *_, **__: engine)
        evaluate_task(model, tokenizer, task, cpu, max_new_tokens=512, max_problems=2)
    assert max(prompts) > 10  # a generous limit leaves the question its room
    result = evaluate_task(model, tokenizer, task, cpu, batch_size=5, max_new_tokens=4)
    assert (result.correct, result.total, result.baseline) == (expected, 12, 0.0)
