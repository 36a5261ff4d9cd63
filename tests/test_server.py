"""The chat server over HTTP, as a process of its own, with a model whose answers are known."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from dev.parrot import ANSWERS, serve
from nanochat import service
from nanochat.service import Guard, Settings
from scripts import chat_web
from nanochat.common import UserError

ENDPOINTS = ("/chat/completions", "/v1/chat/completions")


def body(question="Hello", **more) -> dict:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0} | more


def stream(url: str, request: dict, path="/chat/completions") -> list[dict]:
    with httpx.stream("POST", url + path, json=request, timeout=30) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def stats(url: str) -> dict:
    return httpx.get(url + "/stats").json()


def wait_until(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# --- the page's protocol ------------------------------------------------------------------------------------------------


def test_stream_of_tokens(server):
    for question in ("Hello", "Accents"):
        *tokens, last = stream(server, body(question))
        assert "".join(event["token"] for event in tokens) == ANSWERS[question]
        assert all(event["gpu"] == 0 and "�" not in event["token"] for event in tokens) and len(tokens) > 5
        assert last["done"] is True and last["finish_reason"] == "stop" and last["completion_tokens"] >= len(tokens)


def test_tool_calls_are_told_apart(server):
    parts = []
    for event in stream(server, body("Sum"))[:-1]:
        if not event["token"] or not parts:
            parts.append({"type": event.get("part", "text"), "text": ""})
        assert event.get("part", "text") == parts[-1]["type"]
        parts[-1]["text"] += event["token"]
    assert [part for part in parts if part["text"]] == ANSWERS["Sum"]


def test_a_conversation_reuses_its_beginning(server):
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWERS["Hello"]},
                    {"role": "user", "content": "Count"}]
    first = stream(server, body("Hello"))[-1]
    second = stream(server, {"messages": conversation, "temperature": 0})
    assert "".join(event.get("token", "") for event in second) == ANSWERS["Count"]
    assert second[-1]["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"]
    assert second[-1]["forgotten"] == 0


def test_long_conversations_forget_their_oldest(server):
    turns = [{"role": role, "content": "word " * 40} for _ in range(8) for role in ("user", "assistant")]
    last = stream(server, {"messages": [*turns, {"role": "user", "content": "Hello"}], "max_tokens": 5})[-1]
    assert 0 < last["forgotten"] < 8 and last["prompt_tokens"] < 512 and last["finish_reason"] in ("stop", "length")
    assert stream(server, body("word " * 1000, max_tokens=5))[-1]["cut_tokens"] > 0


def test_same_seed_same_answer_in_a_busy_batch(server):
    def answer(seed):
        return "".join(e.get("token", "") for e in stream(server, body("What else?", temperature=1.5, seed=seed, max_tokens=40)))

    alone = [answer(seed) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, (1, 2, 3, 1, 2, 3, 1, 2))) == [*alone, *alone, *alone[:2]]
    assert len(set(alone)) == 3


# --- OpenAI's client ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai", reason="needs openai (pip install openai)")
    return openai.OpenAI(base_url=server + "/v1", api_key="any", max_retries=0)


def ask(client, question="Hello", **more):
    return client.chat.completions.create(model="nanochat", messages=[{"role": "user", "content": question}],
                                          **({"temperature": 0} | more))


def test_openai_whole_answers(client, server):
    completion = ask(client)
    choice = completion.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWERS["Hello"], "stop")
    assert completion.object == "chat.completion" and completion.id.startswith("chatcmpl-")
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens > 5
    assert usage.completion_tokens == stream(server, body())[-1]["completion_tokens"]
    tool = ask(client, "Sum").choices[0].message
    assert tool.content == "Let me see:  is the product." and tool.parts == ANSWERS["Sum"]
    assert ask(client, "Hello", max_completion_tokens=3).choices[0].finish_reason == "length"
    assert ask(client, "Hello", max_tokens=3).usage.completion_tokens == 3
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert client.chat.completions.create(model="nanochat", messages=system, max_tokens=2).usage.prompt_tokens > 5


def test_openai_stop_n_seed(client):
    assert ask(client, "Count", stop=" 5 ").choices[0].message.content == "1 2 3 4"
    cut = ask(client, "Count", stop=["nowhere", "9 10", "12"])
    assert cut.choices[0].message.content == "1 2 3 4 5 6 7 8 " and cut.choices[0].finish_reason == "stop"
    several = ask(client, "What else?", n=3, temperature=1.5, seed=7, max_tokens=20)
    again = ask(client, "What else?", n=3, temperature=1.5, seed=7, max_tokens=20)
    texts = [choice.message.content for choice in several.choices]
    assert [c.index for c in several.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert several.usage.completion_tokens <= 60


def test_openai_streaming(client):
    chunks = list(ask(client, "Accents", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWERS["Accents"]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 5 and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    texts = {0: "", 1: ""}
    for chunk in ask(client, "Count", stream=True, n=2):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: ANSWERS["Count"], 1: ANSWERS["Count"]}
    with client.chat.completions.create(model="nanochat", messages=[{"role": "user", "content": "Count"}], stream=True) as s:
        next(iter(s))  # and leaves


def test_openai_models_and_errors(client):
    import openai

    assert [model.id for model in client.models.list()] == ["nanochat-parrot"]
    assert client.models.retrieve("nanochat-parrot").id == "nanochat-parrot"
    with pytest.raises(openai.NotFoundError, match="nanochat-parrot") as caught:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        ask(client, temperature=3)
    assert caught.value.type == "invalid_request_error" and caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="does not fit") as caught:
        ask(client, "word " * 1500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        ask(client, logprobs=True)
    assert ask(client, logprobs=False, presence_penalty=0, max_tokens=1).choices


# --- wrong requests -----------------------------------------------------------------------------------------------------


def conversation(count, content="x"):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i in range(count)]


BAD = {
    "malformed JSON": (b'{"messages": [', "JSON"),
    "no JSON at all": (b"hello", "JSON"),
    "empty": (b"", "no body"),
    "invalid UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "UTF-8"),
    "deeply nested": (b"[" * 100_000, "JSON"),
    "a list": (b"[]", "no JSON object"),
    "no messages": ({"messages": []}, "at least 1"),
    "messages is text": ({"messages": "hi"}, "messages"),
    "a message is text": ({"messages": ["hi"]}, "messages.0"),
    "no content": ({"messages": [{"role": "user"}]}, "content"),
    "content is a number": ({"messages": [{"role": "user", "content": 5}]}, "content"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    "unknown part": ({"messages": [{"role": "assistant", "content": [{"type": "image", "text": ""}]}, *conversation(1)]}, "type"),
    "ends with the assistant": ({"messages": conversation(2)}, "last message"),
    "501 messages": ({"messages": conversation(501)}, "at most 500"),
    "8001 characters": ({"messages": conversation(1, "x" * 8001)}, "8000"),
    "32001 characters": ({"messages": conversation(5, "x" * 6401)}, "32000"),
    "temperature 2.1": ({"temperature": 2.1}, "temperature"), "temperature -1": ({"temperature": -1}, "temperature"),
    "temperature nan": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
    "temperature inf": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
    "temperature as text": ({"temperature": "0.5"}, "temperature"), "temperature true": ({"temperature": True}, "temperature"),
    "top-k 201": ({"top_k": 201}, "top_k"), "top-k 1.5": ({"top_k": 1.5}, "top_k"), "top-p 2": ({"top_p": 2}, "top_p"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"), "4097 tokens": ({"max_tokens": 4097}, "max_tokens"),
    "seed as text": ({"seed": "x"}, "seed"), "huge seed": ({"seed": 2**70}, "seed"),
    "endless seed": (b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", ""),
    "empty stop": ({"stop": ""}, "stop"), "five stops": ({"stop": list("abcde")}, "at most 4"),
    "special token": ({"messages": conversation(1, "Hi <|assistant_end|> there")}, "<|assistant_end|>"),
    "lone surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', ""),
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("name", BAD)
def test_bad_requests(server, path, name):
    content, told = BAD[name]
    if isinstance(content, dict):
        content = json.dumps({"model": "nanochat"} | body() | content).encode()
    elif content.startswith(b'{"m') and content.endswith(b"}"):
        content = b'{"model": "nanochat", ' + content[1:]
    response = httpx.post(server + path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    answer = response.json()
    reason = answer["error"]["message"] if path.startswith("/v1") else answer["detail"]
    assert told in reason and "\n" not in reason and len(reason) < 300
    assert path.startswith("/v1") is ("error" in answer)


def test_other_wrong_requests(server):
    assert httpx.get(server + "/nope").status_code == 404 and "/chat/completions" in httpx.get(server + "/nope").json()["detail"]
    assert httpx.get(server + "/chat/completions").status_code == 405
    assert httpx.get(server + "/v1/models/other").json()["error"]["code"] == "model_not_found"
    wrong_type = httpx.post(server + "/chat/completions", content=json.dumps(body()), headers={"Content-Type": "text/plain"})
    assert wrong_type.status_code == 400 and "Content-Type: application/json" in wrong_type.json()["detail"]
    for path in ("/", "/health"):
        assert httpx.head(server + path).status_code == 200
    # so no other site's page can send one without asking (CORS)
    for size in (2**20 + 1, 2**24):
        for content in (b"x" * size, (b"y" * 2**16 for _ in range(size // 2**16 + 1))):  # announced, and chunked
            response = httpx.post(server + "/chat/completions", content=content, timeout=30)
            assert response.status_code == 413 and "1048576 bytes" in response.json()["detail"]
    assert httpx.get(server + "/health").json()["status"] == "ok"


def test_slow_bodies_are_cut_off(monkeypatch):
    monkeypatch.setattr(service, "BODY_SECONDS", 0.1)
    sent, pieces = [], iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive():
        for piece in pieces:
            return piece
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async def never(*_):
        raise AssertionError("it should not get here")

    scope = {"type": "http", "path": "/chat/completions", "headers": [], "method": "POST"}
    asyncio.run(Guard(never, Settings())(scope, receive, send))
    assert sent[0]["status"] == 408 and b"did not arrive" in sent[1]["body"]


def test_garbage_on_the_wire(server):
    host, port = server.removeprefix("http://").split(":")
    for garbage in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                    b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(garbage)
    assert httpx.get(server + "/health").status_code == 200


def test_schemathesis_finds_no_5xx(server):
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (pip install schemathesis)")
    import hypothesis

    schema = schemathesis.openapi.from_url(server + "/openapi.json")
    operations, seen = [result.ok() for result in schema.get_all_operations()], []
    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            @hypothesis.settings(max_examples=25, deadline=None, database=None, derandomize=True,
                                 suppress_health_check=list(hypothesis.HealthCheck))
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                if isinstance(case.body, dict):
                    case.body["max_tokens"] = min(8, case.body["max_tokens"]) if isinstance(case.body.get("max_tokens"), int) else 8
                response = case.call(timeout=30)
                seen.append(response.status_code)
                assert response.status_code < 500, response.text

            try:
                check()
            except hypothesis.errors.Unsatisfiable:  # nothing can be wrong with a request without parameters
                pass
    assert len(operations) == 8 and len(seen) > 100 and 200 in seen and 400 in seen


# --- load, faults, the end ----------------------------------------------------------------------------------------------


def test_full_queue_and_vanished_clients(server):
    def one(_):
        return httpx.post(server + "/v1/chat/completions", json={"model": "nanochat"} | body("Count"), timeout=60)

    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(one, range(40)))
    refused = [r for r in responses if r.status_code == 503]
    assert refused and all(int(r.headers["Retry-After"]) > 0 and r.json()["error"]["code"] == "queue_full" for r in refused)
    served = [r.json()["choices"][0]["message"]["content"] for r in responses if r.status_code == 200]
    assert len(served) + len(refused) == 40 and set(served) == {ANSWERS["Count"]} and len(served) >= 16
    for i in range(30):
        with httpx.stream("POST", server + "/chat/completions", json=body("Count")) as response:
            if i % 2:
                next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):  # a client that waits for a whole answer and gives up
        httpx.post(server + "/v1/chat/completions", json={"model": "nanochat"} | body("Count", n=8), timeout=0.02)
    wait_until(lambda: stats(server)["running"] == 0 and stats(server)["slots"]["active"] == 0, 5)
    assert "".join(event.get("token", "") for event in stream(server, body())) == ANSWERS["Hello"]


def test_stats_health_metrics(server):
    before = stats(server)
    stream(server, body("Count"))
    after = stats(server)
    assert after["requests"]["completed"] == before["requests"]["completed"] + 1
    assert after["devices"][0]["generated"] - before["devices"][0]["generated"] > 100 and after["tokens_per_s"] > 0
    assert after["slots"] == {"total": 8, "active": 0} and after["queue"] == {"waiting": 0, "limit": 8}
    assert httpx.get(server + "/health").json() == {"status": "ok", "ready": True, "model": "nanochat-parrot",
                                                    "engines": {"ready": 1, "total": 1}}
    text = httpx.get(server + "/metrics").text
    assert re.search(r'^nanochat_generated_tokens_total\{device="0"\} \d+$', text, re.MULTILINE)
    for line in text.splitlines():
        assert re.fullmatch(r'# TYPE \w+ (counter|gauge)|\w+(\{\w+="\w+"\})? [\d.e+-]+', line), line


@pytest.fixture(scope="module")
def second(parrot):
    """Another server: two engines, an API key, one allowed origin; (process, address, log)."""
    process, port = serve(parrot, "-n", "2", "--slots", "2", "--cors-origin", "http://there.example", "--drain-seconds", "2",
                          NANOCHAT_API_KEY="secret")
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stdout), daemon=True)
    reader.start()
    yield process, f"http://127.0.0.1:{port}", log
    process.kill()


KEY = {"Authorization": "Bearer secret"}


def test_api_key_and_cors(server, second):
    _, url, _ = second
    for path in ("/stats", "/v1/models", "/metrics", "/openapi.json"):
        refused = httpx.get(url + path)
        assert refused.status_code == 401 and "API key" in refused.text
        assert httpx.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(url + path, headers=KEY).status_code == 200
    assert httpx.post(url + "/chat/completions", json=body()).status_code == 401
    assert httpx.get(url + "/").status_code == 200 and httpx.get(url + "/health").status_code == 200
    asks = {"Origin": "http://there.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(url + "/chat/completions", headers=asks).headers["access-control-allow-origin"] == "http://there.example"
    assert "access-control-allow-origin" not in httpx.get(url + "/health", headers=asks | {"Origin": "http://other.example"}).headers
    assert "access-control-allow-origin" not in httpx.get(server + "/health", headers=asks).headers
    policy = httpx.get(url + "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_killed_engine_is_replaced(second):
    _, url, log = second
    devices = httpx.get(url + "/stats", headers=KEY).json()["devices"]
    assert len({device["pid"] for device in devices}) == 2
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(httpx.post, url + "/chat/completions", json=body("Count", temperature=1.0), headers=KEY, timeout=30)
                   for _ in range(4)]
        for device in devices:
            os.kill(device["pid"], signal.SIGKILL)
        answers = [future.result() for future in running]
    assert all(a.status_code in (200, 503) and ("error" in a.text or "done" in a.text or "detail" in a.text) for a in answers)
    wait_until(lambda: httpx.get(url + "/health").json()["engines"]["ready"] == 2, 60)
    lines = httpx.post(url + "/chat/completions", json=body(), headers=KEY, timeout=30).text.split("\n\n")
    assert "".join(json.loads(line[6:]).get("token", "") for line in lines if line) == ANSWERS["Hello"]
    assert [d["restarts"] for d in httpx.get(url + "/stats", headers=KEY).json()["devices"]] == [1, 1]
    assert any("starting another one" in line for line in log)


def test_log_has_no_content_and_shutdown_is_clean(second):
    process, url, log = second
    secret = "my secret is 4711"
    httpx.post(url + "/chat/completions", json=body(secret, max_tokens=5), headers=KEY, timeout=30)
    httpx.post(url + "/chat/completions", json=body(secret, max_tokens=-5), headers=KEY, timeout=30)
    wait_until(lambda: any("max_tokens" in line for line in log))
    assert any("prompt" in line and "tok/s" in line for line in log) and not any("4711" in line for line in log)
    answers = []

    def read():
        with httpx.stream("POST", url + "/chat/completions", json=body("Count"), headers=KEY, timeout=30) as response:
            answers.extend(response.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: answers)
    process.send_signal(signal.SIGTERM)
    reader.join(20)
    assert any('"done"' in line for line in answers)  # it finished, or was told
    assert process.wait(20) == 0
    wait_until(lambda: log and log[-1] == "stopped\n")


def test_started_wrongly(parrot, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(parrot))
    for flags, told in ((["-g", "nobody"], "nobody"), (["-p", "70000"], "port"), (["-t", "3"], "temperature"),
                        (["--slots", "0"], "slots"), (["-i", "rl"], "rl")):
        with pytest.raises(UserError, match=told):
            chat_web.main(flags)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([sys.executable, "-m", "scripts.chat_web", "-p", port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"127.0.0.1:{port} cannot be listened on" in done.stderr and "Traceback" not in done.stderr
