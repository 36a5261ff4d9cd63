"""The optimizer against torch.optim.AdamW, against the definition of Muon, and its state across world sizes."""

import copy

import pytest
import torch

from nanochat.gpt import GPTConfig, build_model
from nanochat.optim import SMALL, MuonAdamW, adamw_update_, build_optimizer, muon_update_, orthogonalize

CONFIG = GPTConfig(sequence_len=64, vocab_size=130, n_layer=3, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")


def test_adamw_equals_torch():
    torch.manual_seed(0)
    ours = torch.randn(300)
    theirs = ours.clone().requires_grad_()
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    exp_avg, exp_avg_sq = torch.zeros(300), torch.zeros(300)
    for step in range(1, 6):
        theirs.grad = torch.randn(300)
        adamw_update_(ours, theirs.grad, exp_avg, exp_avg_sq, 0.01, 0.8, 0.95, 1e-10, 0.1, step)
        adamw.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_adamw_keeps_fp32_moments_of_bf16_tables():
    param, state = torch.ones(64, dtype=torch.bfloat16), [torch.zeros(64), torch.zeros(64)]
    for step in range(1, 1001):
        adamw_update_(param, torch.full((64,), 1e-2, dtype=torch.bfloat16), *state, 0.0, 0.8, 0.995, 1e-10, 0.0, step)
    grad = torch.tensor(1e-2, dtype=torch.bfloat16).item()
    assert state[1][0].item() == pytest.approx(grad**2 * (1 - 0.995**1000), rel=1e-4)  # bf16 would stall below this


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 64, 24), (2, 24, 64)])
def test_orthogonalize(shape):
    """The singular vectors stay, the singular values come close to one another, the norm is sqrt(min(m, n))."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    out = orthogonalize(x, torch.float32)
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    polar = U @ Vh
    assert torch.nn.functional.cosine_similarity(out.flatten(1), polar.flatten(1)).min() > 0.99
    torch.testing.assert_close(out.norm(dim=(1, 2)), torch.full((shape[0],), min(shape[1:]) ** 0.5))


def test_muon_weight_decay_is_cautious_and_lr_scales_with_shape():
    torch.manual_seed(0)
    start = torch.randn(1, 8, 4)
    grads = torch.randn(1, 8, 4)

    def run(weight_decay):
        params = start.clone()
        muon_update_(params, grads, torch.zeros(1, 8, 4), torch.zeros(1, 8, 1), 0.1, 0.9, 0.9, weight_decay,
                     torch.float32)
        return params

    update = (start - run(0.0)) / (0.1 * 2**0.5)  # lr x sqrt(rows / cols)
    assert update.norm().item() == pytest.approx(2.0, rel=1e-4)  # sqrt(min(8, 4)), preserved by the variance reduction
    decayed = run(0.5)
    agrees = update * start > 0
    extra = run(0.0) - decayed
    torch.testing.assert_close(extra, torch.where(agrees, 0.1 * 2**0.5 * 0.5 * start, torch.zeros_like(start)),
                               rtol=1e-4, atol=1e-6)


def test_groups_follow_the_design():
    optimizer = build_optimizer(build_model(CONFIG, torch.device("cpu"), torch.float32))
    scale = (64 / 768) ** -0.5
    found = {g["names"][0]: g for g in optimizer.param_groups}
    expected = {"lm_head.weight": (0.008 * scale, (0.8, 0.96), 0.01),
                "transformer.wte.weight": (0.3 * scale, (0.8, 0.995), 0.001),
                "value_embeds.0.weight": (0.15 * scale, (0.8, 0.995), 0.01),
                "resid_lambdas": (0.005, (0.8, 0.95), 0.05), "x0_lambdas": (0.5, (0.96, 0.95), 0.0),
                "smear_lambda": (0.2, (0.8, 0.95), 0.0)}
    for name, (lr, betas, decay) in expected.items():
        group = found[name]
        assert (group["kind"], group["betas"], group["weight_decay"]) == ("adamw", betas, decay)
        assert group["lr"] == pytest.approx(lr)
    assert set(found["smear_lambda"]["names"]) == {"smear_gate.weight", "smear_lambda", "backout_lambda"}
    muon = [n for g in optimizer.param_groups if g["kind"] == "muon" for n in g["names"]]
    assert len(muon) == 3 * 6 + 2 and all(n.startswith("transformer.h.") for n in muon)


def take_steps(model, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def test_state_round_trip_is_exact():
    torch.manual_seed(0)
    model = build_model(CONFIG, torch.device("cpu"), torch.bfloat16)
    optimizer = build_optimizer(model)
    take_steps(model, optimizer, [1, 2])
    other = copy.deepcopy(model)
    resumed = build_optimizer(other)
    resumed.load_state_dict([copy.deepcopy(optimizer.state_dict())])
    take_steps(model, optimizer, [3, 4])
    take_steps(other, resumed, [3, 4])
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name


def test_state_of_two_ranks_loads_on_one_and_on_three():
    """Shards saved by a world of 2 are those of a world of 1, cut by rows and padded."""
    torch.manual_seed(0)
    model = build_model(CONFIG, torch.device("cpu"), torch.float32)
    whole = build_optimizer(model)
    take_steps(model, whole, [1])
    full = whole.state_dict()

    def shards(world_size):
        states = []
        for rank in range(world_size):
            part = build_optimizer(model)
            part.rank, part.world_size = rank, world_size
            part.load_state_dict([full])
            states.append(part.state_dict())
        return states

    for world_size in (2, 3):
        states = shards(world_size)
        head = states[-1]["shards"]["lm_head.weight"]["exp_avg"]
        assert head.shape == (-(-192 // world_size), 64)
        back = build_optimizer(model)
        back.load_state_dict(states)
        for name, tensors in full["shards"].items():
            for key, tensor in tensors.items():
                assert torch.equal(back.state_dict()["shards"][name][key], tensor), (name, key)
    assert isinstance(whole, MuonAdamW) and SMALL == 1024
