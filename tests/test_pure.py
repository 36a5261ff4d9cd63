"""Schedules, scaling, packing and the calculator: numbers that can be worked out by hand."""

import math
import random
import threading
import time
import tracemalloc

import pytest

from nanochat import schedule
from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.packing import BestFitBuffer, pack_row
from nanochat.scaling import config_for_depth, count_parameters, flops_per_token, plan


# --- schedule ---


def test_lr_multiplier():
    lr = [schedule.lr_multiplier(step, 1000, 40, 0.65, 0.05) for step in range(1001)]
    assert lr[0] == pytest.approx(1 / 40) and lr[19] == pytest.approx(0.5)
    assert lr[39] == lr[200] == lr[350] == 1.0
    assert lr[675] == pytest.approx(0.5 + 0.5 * 0.05) and lr[1000] == pytest.approx(0.05)
    assert schedule.lr_multiplier(0, 10, 0, 0.0, 0.5) == 1.0
    assert schedule.lr_multiplier(75, 100, 0, 0.5, 0.0) == pytest.approx(0.5)  # SFT's


def test_muon_momentum_and_weight_decay():
    assert schedule.muon_momentum(0, 2000) == pytest.approx(0.85)
    assert schedule.muon_momentum(200, 2000) == pytest.approx(0.91)
    assert schedule.muon_momentum(400, 2000) == schedule.muon_momentum(700, 2000) == pytest.approx(0.97)
    assert schedule.muon_momentum(1350, 2000) == pytest.approx(0.935)
    assert schedule.muon_momentum(2000, 2000) == pytest.approx(0.90)
    short = [schedule.muon_momentum(step, 400) for step in range(401)]  # warmdown from step 140 on, at 0.892
    assert short[140] == pytest.approx(0.892) and short[400] == pytest.approx(0.90)
    assert max(abs(a - b) for a, b in zip(short, short[1:])) < 0.001
    assert [schedule.weight_decay(s, 100, 0.2) for s in (0, 50, 100)] == pytest.approx([0.2, 0.1, 0.0], abs=1e-12)


# --- scaling ---


def test_config_for_depth():
    c = config_for_depth(12, 32768)
    assert (c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.head_dim) == (12, 768, 6, 6, 128)
    assert config_for_depth(13, 32768).n_embd == 896  # 832 rounded up to whole heads


def test_parameter_count_of_depth_12():
    counts = count_parameters(config_for_depth(12, 32768))
    assert counts["blocks"] == 12 * 12 * 768**2 + 6 * 12 * 6  # and six gates of 6 x 12
    assert counts["lm_head"] == counts["wte"] == 32768 * 768 and counts["value_embeds"] == 6 * 32768 * 768
    assert counts["scaling"] == counts["blocks"] + counts["lm_head"]


def test_flops_per_token():
    c = GPTConfig(sequence_len=1024, vocab_size=32768, n_layer=4, n_head=6, n_kv_head=6, n_embd=768,
                  window_pattern="SSSL")
    matmul = 4 * 12 * 768**2 + 2 * 12 * 6 + 768 * 32768 + 24
    assert flops_per_token(c) == 6 * matmul + 12 * 6 * 128 * (3 * 256 + 1024)


def test_plan_of_the_reference():
    c = config_for_depth(12, 32768)
    p = plan(c)
    assert p.total_batch_size == 2**19 and p.lr_scale == 1.0 and p.weight_decay == pytest.approx(0.28)
    assert p.num_iterations == round(12 * count_parameters(c)["scaling"] / 2**19)
    assert p.device_batch_size == 32 and p.grad_accum_steps == 8


def test_plan_of_depth_24():
    c, ratio = config_for_depth(24, 32768), 8.0
    p = plan(c, target_param_data_ratio=ratio, world_size=8, device_batch_size=16)
    size = count_parameters(c)["scaling"] / count_parameters(config_for_depth(12, 32768))["scaling"]
    assert p.total_batch_size == 2 ** round(19 + math.log2(size) * 0.383) == 2**20
    assert p.lr_scale == pytest.approx(2**0.5) and p.weight_decay == pytest.approx(0.28 * 2**0.5 / size)
    assert p.grad_accum_steps == 4


def test_plan_horizons_in_order():
    c = config_for_depth(4, 32768)
    assert plan(c, num_iterations=7, target_flops=1e15).num_iterations == 7
    by_flops = plan(c, target_flops=1e15)
    assert by_flops.total_flops == pytest.approx(1e15, rel=0.1)
    with pytest.raises(UserError, match="no multiple"):
        plan(c, total_batch_size=1000, device_batch_size=4)


# --- packing ---


def brute_force(documents, capacity, size):
    """Best fit by looking at everything: largest that fits (oldest of equals), else the shortest, cropped."""
    waiting, rest, rows = [], list(enumerate(documents)), []
    while True:
        row, room = [], capacity
        while room:
            while len(waiting) < size and rest:
                waiting.append(rest.pop(0))
            if not waiting:
                return rows
            fits = [d for d in waiting if len(d[1]) <= room]
            choice = max(fits, key=lambda d: (len(d[1]), -d[0])) if fits else min(waiting, key=lambda d: (len(d[1]), d[0]))
            waiting.remove(choice)
            row.append(choice[1])
            room -= min(room, len(choice[1]))
        rows.append(row)


def test_packing_equals_brute_force():
    rng = random.Random(0)
    documents = [[i] * rng.choice((3, 5, 8, rng.randrange(1, 90))) for i in range(600)]
    buffer, rest, rows = BestFitBuffer(), list(enumerate(documents)), []

    def refill():
        while len(buffer) < 50 and rest:
            i, d = rest.pop(0)
            buffer.add(len(d), i, d)

    while sum(map(len, row := pack_row(buffer, 64, refill, crop=True))) >= 64:
        rows.append(row)
    assert rows == brute_force(documents, 64, 50)


def test_packing_without_cropping_keeps_documents_whole():
    buffer = BestFitBuffer()
    for i, n in enumerate((40, 30, 30, 20, 7)):
        buffer.add(n, i, [i] * n)
    rows = [[len(d) for d in pack_row(buffer, 64, lambda: None, crop=False)] for _ in range(3)]
    assert rows == [[40, 20], [30, 30], [7]]


# --- calculator ---


@pytest.mark.parametrize("expression,result", [
    ("12 * (3 + 4)", "84"), ("1,234 + 1", "1235"), ("10 / 4", "2.5"), ("6/3", "2.0"), ("7 // 2", "3"), ("7 % 4", "3"),
    ("-3 - -3", "0"), ("0.1 + 0.2", "0.3"), ("2*(3+(4-1))", "12"), ("1,000,000 * 2", "2000000"), (" 5 ", "5"),
    ("'strawberry'.count('r')", "3"), ('"a,b,c".count(",")', "2"), ("' banana'.count('an')", "2"),
])
def test_calculator(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize("expression", [
    "", "2 ** 9", "1 / 0", "import os", "__import__('os')", "abs(3)", "1,2", "12,34", "(1", "1 2", "'a'.upper()", "a",
    "'a' * 9", "9" * 300, "(" * 200 + "1" + ")" * 200, "-" * 250 + "1", "*".join(["999999999999"] * 15), "1e999",
    "'a'.count('a').bit_length()", "'it''s'.count('s')", "5 % 0", "1_000",
])
def test_calculator_has_no_result(expression):
    start = time.perf_counter()
    assert calculate(expression) is None
    assert time.perf_counter() - start < 1


HOSTILE = ("9" * 10**6, "1." + "0" * 10**6, "9" * 200 + "*" + "9" * 50, "(" * 10**6, "-" * 10**6 + "1", "*".join(["99999"] * 40),
           "1+" * 10**5 + "1", "9**9**9", "2 << 1000000000", "1" + ",000" * 10**5, " " * 10**7, "1 " * 10**6, "\n" * 10**6,
           "'a' * 1000000000", "'a'.ljust(1000000000)", "'%1000000000d' % 1", "f'{1:1000000000}'", "'a'.center(10**9, 'b')",
           "'" + "a" * 10**7 + "'.count('a')", "'a'.count('" + "a" * 10**6 + "')", "'a'.replace('a', 'b' * 10**9)",
           "'a'.count('a') * 10**10", "str(10**100000)", "[0] * 10**10", "range(10**10)", "lambda: 0", "0x" + "f" * 10**5, "1e308*10",
           "1e-400", "1" + "0" * 29 + "*100", "10" + "%3" * 10**5, "'" * 10**5, "\x00" * 1000, "\u0661\u0662")


def test_hostile_expressions_have_no_result_and_take_no_memory():
    """From another thread, within 10 MB of new memory."""
    results: list = []
    tracemalloc.start()
    thread = threading.Thread(target=lambda: results.extend(map(calculate, HOSTILE)))
    thread.start()
    thread.join()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert results == [None] * len(HOSTILE) and peak < 10 * 2**20


def test_calculator_off_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(calculate("6 * 7")))
    thread.start()
    thread.join()
    assert results == ["42"]
