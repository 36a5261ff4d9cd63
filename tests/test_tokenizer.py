"""The tokenizer: round trips, specials, storage, and how conversations are rendered."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

TEXTS = ["Hello world", "", "  spaces  \n\n", "12345 and 67", "naïve café 서울 🙂", "<|bos|> is <|assistant_end|> text",
         "\x00\x01\xff", "'quoted' \"words\" don't"]
CHAT = {"messages": [
    {"role": "user", "content": "How many r?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Let me see. "},
                                      {"type": "python", "text": "'rr'.count('r')"},
                                      {"type": "python_output", "text": "2"}, {"type": "text", "text": " Two."}]},
    {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Bye"}]}


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_specials_are_the_last_ids_and_text_never_makes_them(tokenizer):
    first = tokenizer.get_vocab_size() - 9
    assert [tokenizer.encode_special(s) for s in SPECIAL_TOKENS] == list(range(first, first + 9))
    assert tokenizer.get_bos_token_id() == first and tokenizer.get_special_tokens() == set(SPECIAL_TOKENS)
    for text in SPECIAL_TOKENS:
        assert max(tokenizer.encode(text)) < first
        ids, _ = tokenizer.render_conversation({"messages": [{"role": "user", "content": text * 3}]})
        assert [i for i in ids if i >= first] == [first, first + 1, first + 2]


def test_numbers_are_split_into_groups_of_two(tokenizer):
    assert all(len(tokenizer.decode([t])) <= 2 for t in tokenizer.encode("1234567"))


def test_lists_prepend_append(tokenizer):
    bos = tokenizer.get_bos_token_id()
    single = [tokenizer.encode(t, prepend="<|bos|>", append=bos) for t in TEXTS]
    assert tokenizer.encode(TEXTS, prepend=bos, append="<|bos|>") == single
    assert single[0][0] == single[0][-1] == bos


def test_encode_documents(tokenizer):
    with ThreadPoolExecutor(2) as pool:
        documents = tokenizer.encode_documents([*TEXTS, "lone \ud800 surrogate"], pool)
    assert [d.tolist() for d in documents[:-1]] == [tokenizer.encode(t, prepend="<|bos|>") for t in TEXTS]
    assert tokenizer.decode(documents[-1][1:].tolist()) == "lone \ufffd surrogate" and documents[0].dtype.itemsize == 2


def test_token_bytes_come_from_raw_bytes(tokenizer):
    sizes = tokenizer.token_bytes()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert sum(sizes[i].item() for i in ids) == len(text.encode())  # partial characters count as their bytes
    assert sizes[-9:].tolist() == [0] * 9 and (sizes[:-9] > 0).all()


def test_storage_is_plain_data_with_a_hash(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = RustBPETokenizer.from_directory(tmp_path)
    assert again.content_hash() == tokenizer.content_hash() and again.encode(TEXTS) == tokenizer.encode(TEXTS)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["tokens"][300], data["tokens"][301] = data["tokens"][301], data["tokens"][300]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="damaged"):
        RustBPETokenizer.from_directory(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        RustBPETokenizer.from_directory(tmp_path)
    with pytest.raises(UserError, match="tok_train"):
        RustBPETokenizer.from_directory(tmp_path / "nowhere")


def test_render_conversation(tokenizer):
    ids, mask = tokenizer.render_conversation(CHAT)
    s, e = tokenizer.encode_special, tokenizer.encode
    expected = [(s("<|bos|>"), 0), (s("<|user_start|>"), 0), *((t, 0) for t in e("How many r?")), (s("<|user_end|>"), 0),
                (s("<|assistant_start|>"), 0), *((t, 1) for t in e("Let me see. ")),
                (s("<|python_start|>"), 1), *((t, 1) for t in e("'rr'.count('r')")), (s("<|python_end|>"), 1),
                (s("<|output_start|>"), 0), *((t, 0) for t in e("2")), (s("<|output_end|>"), 0),
                *((t, 1) for t in e(" Two.")), (s("<|assistant_end|>"), 1),
                (s("<|user_start|>"), 0), *((t, 0) for t in e("Thanks")), (s("<|user_end|>"), 0),
                (s("<|assistant_start|>"), 0), *((t, 1) for t in e("Bye")), (s("<|assistant_end|>"), 1)]
    assert list(zip(ids, mask)) == expected
    assert tokenizer.render_conversation(CHAT, max_tokens=7) == (ids[:7], mask[:7])
    assert "\033[32m" in tokenizer.visualize_tokenization(ids, mask)


def test_render_for_completion(tokenizer):
    prompt = tokenizer.render_for_completion(CHAT)
    ids, _ = tokenizer.render_conversation({"messages": CHAT["messages"][:3]})
    assert prompt == ids + [tokenizer.encode_special("<|assistant_start|>")]
    short = tokenizer.render_for_completion(CHAT, max_tokens=10)
    assert len(short) == 10 and short[0] == prompt[0] and short[1:] == prompt[-9:]


def test_system_message_is_merged(tokenizer):
    with_system = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    merged = {"messages": [{"role": "user", "content": "Be brief.\n\nHi"}]}
    assert tokenizer.render_conversation(with_system) == tokenizer.render_conversation(merged)
    assert with_system["messages"][0]["role"] == "system"  # the input is left alone


@pytest.mark.parametrize("messages", [
    [], "hi", [{"role": "assistant", "content": "x"}], [{"role": "user"}], [{"role": "robot", "content": "x"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], [{"role": "user", "content": 3}],
    [{"role": "system", "content": "a"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}]])
def test_malformed_conversations_are_refused(tokenizer, messages):
    with pytest.raises(UserError):
        tokenizer.render_conversation({"messages": messages})


def test_small_vocabulary_is_refused():
    with pytest.raises(UserError, match="265"):
        RustBPETokenizer.train_from_iterator(iter(["a"]), 200)
