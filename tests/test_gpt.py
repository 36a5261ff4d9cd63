"""The model against a second implementation in float64, and its cache against the full forward."""

import math

import pytest
import torch

from nanochat.checkpoint_manager import build_from_state, config_from_meta
from nanochat.common import UserError
from nanochat.engine import KVCache
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.scaling import count_parameters

CPU = torch.device("cpu")
SMALL = GPTConfig(sequence_len=512, vocab_size=100, n_layer=5, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL")


def lively(config=SMALL, seed=0, dtype=torch.float32) -> GPT:
    """A model whose zero-initialised parts are random too, so that every term counts."""
    torch.manual_seed(seed)
    model = build_model(config, CPU, dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                p.normal_(std=0.1)
            if name in ("smear_lambda", "backout_lambda"):
                p.fill_(0.7)
            if "gate" in name:
                p.normal_(std=0.5)
    return model.eval()


def reference_logits(model: GPT, ids: list[int]) -> torch.Tensor:
    """The forward pass of DESIGN section 3 in float64, one position and one head at a time."""
    c, W = model.config, {k: v.double() for k, v in model.state_dict().items()}
    D = c.n_embd // c.n_head

    def rms(x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)

    def rotate(x, position):
        out = x.clone()
        for i in range(D // 2):
            theta = position * 100000 ** (-2 * i / D)
            a, b = x[i], x[i + D // 2]
            out[i] = a * math.cos(theta) + b * math.sin(theta)
            out[i + D // 2] = -a * math.sin(theta) + b * math.cos(theta)
        return out

    plain = [rms(W["transformer.wte.weight"][i]) for i in ids]
    x = [plain[0]]
    for t in range(1, len(ids)):
        gate = torch.sigmoid(W["smear_gate.weight"] @ plain[t][:24])
        x.append(plain[t] + W["smear_lambda"] * gate * plain[t - 1])
    x0, middle = x, None
    for layer in range(c.n_layer):
        p = f"transformer.h.{layer}."
        x = [W["resid_lambdas"][layer] * a + W["x0_lambdas"][layer] * b for a, b in zip(x, x0)]
        letter = "L" if layer == c.n_layer - 1 else c.window_pattern[layer % len(c.window_pattern)]
        window = len(ids) if letter == "L" else math.ceil(c.sequence_len / 4 / 128) * 128
        q, k, v = [], [], []
        for t, a in enumerate(map(rms, x)):
            value = (W[p + "attn.c_v.weight"] @ a).view(c.n_kv_head, D)
            if layer % 2 == (c.n_layer - 1) % 2:
                gate = 3 * torch.sigmoid(W[p + "attn.ve_gate.weight"] @ a[:12])
                value = value + gate[:, None] * W[f"value_embeds.{layer}.weight"][ids[t]].view(c.n_kv_head, D)
            q.append([1.2 * rms(rotate(h, t)) for h in (W[p + "attn.c_q.weight"] @ a).view(c.n_head, D)])
            k.append([1.2 * rms(rotate(h, t)) for h in (W[p + "attn.c_k.weight"] @ a).view(c.n_kv_head, D)])
            v.append(value)
        new = []
        for t, a in enumerate(x):
            heads = []
            for h in range(c.n_head):
                kv = h // (c.n_head // c.n_kv_head)
                seen = range(max(0, t - window), t + 1)
                weights = torch.softmax(torch.stack([q[t][h] @ k[s][kv] for s in seen]) / math.sqrt(D), 0)
                heads.append(sum(w * v[s][kv] for w, s in zip(weights, seen)))
            a = a + W[p + "attn.c_proj.weight"] @ torch.cat(heads)
            new.append(a + W[p + "mlp.c_proj.weight"] @ torch.relu(W[p + "mlp.c_fc.weight"] @ rms(a)) ** 2)
        x = new
        if layer == c.n_layer // 2:
            middle = x
    final = [rms(a - W["backout_lambda"] * b) for a, b in zip(x, middle)]
    logits = torch.stack([W["lm_head.weight"][:c.vocab_size] @ a for a in final])
    return 15 * torch.tanh(logits / 15)


def test_forward_equals_float64_reference():
    model = lively()
    ids = torch.randint(0, 100, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0].double(), reference_logits(model, ids[0].tolist()), rtol=0, atol=2e-4)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = lively()
    ids, targets = torch.randint(0, 100, (2, 2, 40))
    targets[0, :7] = -1
    expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1).double(), targets.flatten(), ignore_index=-1)
    assert model(ids, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(ids, targets, loss_reduction="sum").item() == pytest.approx(expected.item() * 73, rel=1e-5)
    with torch.no_grad():
        assert model(ids, targets).item() == pytest.approx(expected.item(), rel=1e-5)
        each = model(ids, targets, loss_reduction="none")
    assert each.shape == (80,) and (each[:7] == 0).all()


def test_causality():
    model = lively()
    ids = torch.randint(0, 100, (1, 300))
    changed = ids.clone()
    changed[0, 200] = (changed[0, 200] + 1) % 100
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :200], b[:, :200], rtol=0, atol=1e-5)
    assert (a[:, 200:] - b[:, 200:]).abs().max() > 1e-3


@pytest.mark.parametrize("chunks", [[300], [1] * 20, [7, 1, 130, 2, 140, 1, 1], [256, 44]])
def test_cached_equals_full_forward(chunks):
    """Prefill in chunks, decoding one by one, across windows, with grouped queries and the smear."""
    model = lively()
    T = sum(chunks)
    ids = torch.randint(0, 100, (2, T))
    cache = KVCache.for_model(model, 2, T)
    with torch.no_grad():
        full = model(ids)
        cached = torch.cat([model(part, kv_cache=cache) for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(cached, full, rtol=0, atol=1e-4)


def test_rows_of_a_cache_have_their_own_lengths():
    model = lively()
    long, short = torch.randint(0, 100, (1, 200)), torch.randint(0, 100, (1, 30))
    cache = KVCache.for_model(model, 2, 220)
    with torch.no_grad():
        for row, prompt in enumerate((long, short)):
            model.next_logits(prompt, cache.rows([row]))
        step = torch.tensor([[5], [9]])
        both = model.next_logits(step, cache)
        for row, prompt in enumerate((long, short)):
            alone = model(torch.cat((prompt, step[row:row + 1]), dim=1))[0, -1]
            torch.testing.assert_close(both[row], alone, rtol=0, atol=1e-4)


def test_padded_rows_of_a_chunk():
    """Rows with fewer tokens than the chunk, on slots in another order; what padding writes disturbs nobody."""
    model = lively()
    prompts = [torch.randint(0, 100, (n,)) for n in (150, 40, 97)]
    cache = KVCache.for_model(model, 4, 160)
    slots, chunk = [2, 0, 3], 50
    with torch.no_grad():
        for start in range(0, 150, chunk):
            live = [i for i, prompt in enumerate(prompts) if len(prompt) > start]
            pieces = [prompts[i][start:start + chunk] for i in live]
            padded = torch.stack([torch.cat((p, torch.zeros(chunk - len(p), dtype=torch.long))) for p in pieces])
            model.features(padded, cache.rows([slots[i] for i in live], [len(p) for p in pieces]))
        assert cache.lengths == [40, 0, 150, 97]
        step = torch.tensor([[5], [9], [3]])
        together = model.next_logits(step, cache.rows(slots))
        for i, prompt in enumerate(prompts):
            alone = model(torch.cat((prompt, step[i]))[None])[0, -1]
            torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-4)


def test_copied_and_shortened_rows():
    """A slot that takes over the first part of another's goes on as if it had read that itself."""
    model = lively()
    prompt, other = torch.randint(0, 100, (180,)), torch.randint(0, 100, (60,))
    cache = KVCache.for_model(model, 2, 200)
    with torch.no_grad():
        model.next_logits(prompt[None], cache.rows([0]))
        cache.set_row(1, 140, int(prompt[139]), source=0)
        cache.set_row(0, 30, int(prompt[29]))
        for slot, length in ((1, 140), (0, 30)):
            got = model.next_logits(other[None], cache.rows([slot]))
            expected = model(torch.cat((prompt[:length], other))[None])[:, -1]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_single_token_without_cache():
    model = lively()
    with torch.no_grad():
        out = model(torch.tensor([[3]]))
    torch.testing.assert_close(out[0].double(), reference_logits(model, [3]), rtol=0, atol=1e-4)


def test_parameter_names_and_count():
    model = GPT(SMALL)
    names = set(dict(model.named_parameters()))
    assert {"transformer.wte.weight", "lm_head.weight", "resid_lambdas", "x0_lambdas", "smear_gate.weight",
            "smear_lambda", "backout_lambda", "value_embeds.0.weight", "value_embeds.2.weight", "value_embeds.4.weight",
            "transformer.h.0.attn.ve_gate.weight", "transformer.h.1.attn.c_q.weight", "transformer.h.1.attn.c_k.weight",
            "transformer.h.1.attn.c_v.weight", "transformer.h.1.attn.c_proj.weight", "transformer.h.1.mlp.c_fc.weight",
            "transformer.h.1.mlp.c_proj.weight"} <= names
    assert "value_embeds.1.weight" not in names and "transformer.h.1.attn.ve_gate.weight" not in names
    assert sum(p.numel() for p in model.parameters()) == count_parameters(SMALL)["total"]
    assert set(model.state_dict()) == names  # rotary tables are not stored


def test_initialisation_fills_everything():
    with torch.device("meta"):
        model = GPT(SMALL)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), name
    block = model.transformer.h[0]
    std = 64**-0.5
    for tensor, expected in ((model.transformer.wte.weight, 0.8), (model.lm_head.weight, 0.001),
                             (block.attn.c_q.weight, std), (block.mlp.c_fc.weight, 0.4 * std),
                             (model.value_embeds["0"].weight, std)):
        assert tensor.std().item() == pytest.approx(expected, rel=0.1)
    assert block.attn.c_q.weight.abs().max() <= math.sqrt(3) * std
    assert not block.attn.c_proj.weight.any() and not block.mlp.c_proj.weight.any()
    assert model.resid_lambdas.tolist() == pytest.approx([1.15, 1.125, 1.1, 1.075, 1.05])
    assert model.x0_lambdas.tolist() == pytest.approx([0.2, 0.1625, 0.125, 0.0875, 0.05])
    assert model.smear_lambda.item() == 0 and model.backout_lambda.item() == pytest.approx(0.2)
    assert 0 <= model.smear_gate.weight.min() and model.smear_gate.weight.max() <= 0.02


def test_padded_vocabulary_is_cropped():
    config = GPTConfig(sequence_len=16, vocab_size=65, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    model = build_model(config, CPU, torch.float32)
    assert model.transformer.wte.weight.shape == (128, 32)
    ids = torch.randint(0, 65, (1, 8))
    assert model(ids).shape == (1, 8, 65)
    model(ids, ids).backward()
    assert not model.lm_head.weight.grad[65:].any() and model.lm_head.weight.grad[:65].any()


def test_compute_dtype():
    model = build_model(SMALL, CPU, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32
    assert model(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.float32
    assert KVCache.for_model(model, 1, 8).k_cache.dtype == torch.bfloat16
    assert build_model(SMALL, CPU, torch.float16).transformer.wte.weight.dtype == torch.float32
    assert model.for_inference().lm_head.weight.dtype == torch.bfloat16


def test_weights_cast_once_gives_the_same_logits():
    model = lively(dtype=torch.bfloat16)
    ids = torch.randint(0, 100, (1, 20))
    with torch.no_grad():
        before = model(ids)
        with model.weights_cast_once():
            torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        assert (model(ids) - before).abs().max() > 1e-3  # the casts are gone


def test_older_checkpoints_compute_what_they_did():
    """Without the newer parameters: lambdas neutral, no smear, no backout, no value embeddings, full windows."""
    model = lively(GPTConfig(sequence_len=512, vocab_size=100, n_layer=5, n_head=4, n_kv_head=4, n_embd=64,
                             window_pattern="L"))
    with torch.no_grad():
        for name, value in (("resid_lambdas", 1), ("x0_lambdas", 0), ("smear_lambda", 0), ("backout_lambda", 0)):
            model.get_parameter(name).fill_(value)
        for table in model.value_embeds.values():
            table.weight.zero_()
    state = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()
             if not k.startswith(("resid", "x0", "smear", "backout", "value_embeds")) and "ve_gate" not in k}
    config = config_from_meta({"sequence_len": 512, "vocab_size": 100, "n_layer": 5, "n_head": 4, "n_kv_head": 4,
                               "n_embd": 64})
    assert config.window_pattern == "L"
    old = build_from_state(config, state, CPU, torch.float32)
    ids = torch.randint(0, 100, (1, 50))
    with torch.no_grad():
        torch.testing.assert_close(old(ids), model(ids), rtol=0, atol=1e-5)


def test_windows():
    config = GPTConfig(sequence_len=2048, n_layer=6, window_pattern="SSSL")
    assert config.windows() == [512, 512, 512, -1, 512, -1]
    assert GPTConfig(sequence_len=600, n_layer=2, window_pattern="S").windows() == [256, -1]
    assert GPTConfig(sequence_len=2050, n_layer=2).windows() == [640, -1]


@pytest.mark.parametrize("change", [{"window_pattern": "XYZ"}, {"window_pattern": ""}, {"n_layer": 0}, {"n_embd": 100},
                                    {"n_kv_head": 4}, {"sequence_len": 0}])
def test_impossible_configs_are_refused(change):
    with pytest.raises(UserError):
        GPTConfig(**change)
