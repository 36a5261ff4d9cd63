"""MuonAdamW: Muon for the matrices of the blocks, AdamW for everything else, sharded over the ranks (ZeRO-2 style).

Gradients are summed over ranks (the loss is already divided by the whole step's tokens). Without a process group the
same code runs with one shard and no communication.

References: Muon (Jordan 2024), Polar Express (arXiv 2505.16932), NorMuon (2510.05491), MuonEq (2603.28254),
Muon+ (2602.21545), cautious weight decay (2411.16085), ZeRO (1910.02054).
"""

import torch
import torch.distributed as dist

POLAR_EXPRESS = (  # coefficients (a, b, c) of five iterations, safety 2e-2, cushion 2
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SMALL = 1024  # AdamW tensors with fewer elements are updated whole on every rank
CPU_SLICE = 1 << 17  # elements updated at a time on CPU, so that the intermediates stay in cache


def adamw_update_(param, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step) -> None:
    """One AdamW step in place, in fp32 whatever `param` is stored in; `step` counts from 1."""
    value, grad = param.float(), grad.float()
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad * grad, 1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    value = value * (1 - lr * weight_decay) - exp_avg / denominator * (lr / (1 - beta1**step))
    param.copy_(value)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearest semi-orthogonal matrices to a stack (K, m, n) by Polar Express, iterated in `dtype`, scaled to Frobenius
    norm sqrt(min(m, n)) and returned in fp32."""
    m, n = matrices.shape[-2:]
    x = matrices.to(dtype)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        if m > n:
            gram = x.mT @ x
            x = a * x + x @ (b * gram + c * (gram @ gram))
        else:
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.float()
    return x * (min(m, n) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6))


def muon_update_(params, grads, momentum_buffer, second_moment, lr, momentum, beta2, weight_decay, dtype) -> None:
    """One Muon step in place on a stack (K, m, n) of fp32 matrices."""
    m, n = params.shape[-2:]
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = grads.lerp(momentum_buffer, momentum)
    row_norms = update.norm(dim=-1, keepdim=True)
    update = update * (row_norms.mean(dim=-2, keepdim=True) / row_norms.clamp(min=1e-10))
    update = orthogonalize(update, dtype)
    # NorMuon: divide by the running rms over the shorter side, then restore the norm
    mean_square = update.square().mean(dim=-1 if m >= n else -2, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    normalized = update * second_moment.clamp(min=1e-10).rsqrt()
    norm_before, norm_after = (x.norm(dim=(-2, -1), keepdim=True) for x in (update, normalized))
    update = normalized * (norm_before / norm_after.clamp(min=1e-10))
    lr = lr * max(1.0, m / n) ** 0.5
    agrees = update * params >= 0
    params.sub_(lr * update + lr * weight_decay * params * agrees)


class MuonAdamW(torch.optim.Optimizer):
    """See the module's docstring; `param_groups` entries carry kind ("adamw" | "muon"), names, params, lr and more.

    AdamW state: exp_avg and exp_avg_sq, fp32, this rank's rows. Muon state: one stack per group, this rank's matrices.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, compile: bool = False):
        super().__init__(groups, defaults={})
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            group["initial_lr"], group["step"] = group["lr"], 0
            self._allocate_state(group)
        self._adamw_update = torch.compile(adamw_update_, dynamic=False) if compile else adamw_update_
        self._muon_update = torch.compile(muon_update_, dynamic=False) if compile else muon_update_

    def _allocate_state(self, group) -> None:
        """Zero moments, before the first step: allocated amid activations they would fragment a CPU's heap."""
        if group["kind"] == "muon":
            first, (m, n) = group["params"][0], group["params"][0].shape
            matrices = self._shard_rows(len(group["params"]))
            second = (matrices, m, 1) if m >= n else (matrices, 1, n)
            self.state[first] = {"momentum": torch.zeros(matrices, m, n, device=first.device),
                                 "second_moment": torch.zeros(second, device=first.device)}
            return
        for param in group["params"]:
            rows = self._shard_rows(param.size(0)) if self._is_sharded(param) else param.size(0)
            self.state[param] = {key: torch.zeros(rows, *param.shape[1:], dtype=torch.float32, device=param.device)
                                 for key in ("exp_avg", "exp_avg_sq")}

    # --- sharding: row counts are padded up to a multiple of the world size ---

    def _is_sharded(self, param) -> bool:
        return self.world_size > 1 and param.numel() >= SMALL

    def _shard_rows(self, rows: int) -> int:
        return -(-rows // self.world_size)

    def _my_rows(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor, zero-padded to the size of a shard."""
        size = self._shard_rows(full.size(0))
        mine = full[self.rank * size:(self.rank + 1) * size]
        missing = size - mine.size(0)
        return torch.cat((mine, mine.new_zeros(missing, *full.shape[1:]))) if missing else mine

    def _reduce_scatter(self, full: torch.Tensor):
        """Start summing `full` over ranks by rows -> (this rank's rows, handle)."""
        if self.world_size == 1:
            return full, None
        size = self._shard_rows(full.size(0))
        missing = size * self.world_size - full.size(0)
        padded = torch.cat((full, full.new_zeros(missing, *full.shape[1:]))) if missing else full.contiguous()
        shard = full.new_empty(size, *full.shape[1:])
        return shard, dist.reduce_scatter_tensor(shard, padded, op=dist.ReduceOp.SUM, async_op=True)

    def _all_gather(self, shard: torch.Tensor):
        """Start collecting every rank's rows -> (all rows, padding included; handle)."""
        if self.world_size == 1:
            return shard, None
        full = shard.new_empty(shard.size(0) * self.world_size, *shard.shape[1:])
        return full, dist.all_gather_into_tensor(full, shard.contiguous(), async_op=True)

    # --- step ---

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Reduce all gradients asynchronously, update each shard as its gradient arrives, gather the parameters."""
        reductions = [self._start_group(group) for group in self.param_groups]
        gathers = []
        for group, started in zip(self.param_groups, reductions):
            update = self._update_adamw if group["kind"] == "adamw" else self._update_muon
            gathers.extend(update(group, started))
        for finish in gathers:
            finish()

    def _start_group(self, group):
        if group["kind"] == "muon":
            return [self._reduce_scatter(torch.stack([p.grad for p in group["params"]]))]
        started = []
        for param in group["params"]:
            if self._is_sharded(param):
                started.append(self._reduce_scatter(param.grad))
            else:
                handle = dist.all_reduce(param.grad, async_op=True) if self.world_size > 1 else None
                started.append((param.grad, handle))
        return started

    def _update_adamw(self, group, started):
        group["step"] += 1
        for param, (grad, handle) in zip(group["params"], started):
            if handle is not None:
                handle.wait()
            sharded = self._is_sharded(param)
            mine = self._my_rows(param.data) if sharded else param.data
            state = self.state[param]
            tensors = [t.view(-1) for t in (mine, grad, state["exp_avg"], state["exp_avg_sq"])]
            beta1, beta2 = group["betas"]
            for pieces in zip(*(t.split(CPU_SLICE) if t.device.type == "cpu" else (t,) for t in tensors)):
                self._adamw_update(*pieces, *self._scalars(mine, group["lr"], beta1, beta2, group["eps"],
                                                           group["weight_decay"], group["step"]))
            if sharded:
                full, gather = self._all_gather(mine)
                yield lambda param=param, full=full, gather=gather: (gather.wait(), param.copy_(full[:param.size(0)]))

    def _update_muon(self, group, started):
        ((grads, handle),) = started
        if handle is not None:
            handle.wait()
        mine = self._my_rows(torch.stack([p.data for p in group["params"]]))
        state = self.state[group["params"][0]]
        self._muon_update(mine, grads, state["momentum"], state["second_moment"],
                          *self._scalars(mine, group["lr"], group["momentum"], group["beta2"], group["weight_decay"]),
                          self.dtype)
        full, gather = self._all_gather(mine)

        def finish():
            if gather is not None:
                gather.wait()
            torch._foreach_copy_(group["params"], list(full[:len(group["params"])].unbind(0)))

        yield finish

    @staticmethod
    def _scalars(like, *values):
        """Scalars that change from step to step, as CPU tensors on CUDA so that compiled code is not specialised."""
        return values if like.device.type == "cpu" else [torch.tensor(v, dtype=torch.float32) for v in values]

    # --- state ---

    def state_dict(self) -> dict:
        """This rank's shard, keyed by parameter names, so that any world size can read it."""
        shards = {}
        for group in self.param_groups:
            owners = group["params"][:1] if group["kind"] == "muon" else group["params"]
            for name, param in zip(group["names"], owners):
                shards[name] = dict(self.state[param])
        steps = {group["names"][0]: group["step"] for group in self.param_groups}
        return {"shards": shards, "steps": steps, "world_size": self.world_size}

    @torch.no_grad()
    def load_state_dict(self, states: list[dict]) -> None:
        """Load what `state_dict` gave on every rank of the run that saved it (its own alone at an equal world size)."""
        for group in self.param_groups:
            group["step"] = states[0]["steps"][group["names"][0]]
            muon = group["kind"] == "muon"
            for name, param in zip(group["names"], group["params"][:1] if muon else group["params"]):
                rows = len(group["params"]) if muon else param.size(0)
                sharded = muon or param.numel() >= SMALL
                for key in states[0]["shards"][name]:
                    parts = [state["shards"][name][key].to(param.device) for state in states]
                    if len(states) == 1 and states[0]["world_size"] == self.world_size:
                        mine = parts[0]
                    elif sharded:
                        mine = self._my_rows(torch.cat(parts)[:rows])
                    else:
                        mine = parts[0]
                    self.state[param][key] = mine.clone()


def build_optimizer(model, *, embedding_lr: float = 0.3, unembedding_lr: float = 0.008, matrix_lr: float = 0.02,
                    scalar_lr: float = 0.5, weight_decay: float = 0.28, compile: bool = False) -> MuonAdamW:
    """The optimizer of a GPT, from its named parameters; the learning rates are those of n_embd 768."""
    table_scale = (model.config.n_embd / 768) ** -0.5
    adamw = [  # name prefix, learning rate, betas, weight decay
        ("lm_head.", unembedding_lr * table_scale, (0.8, 0.96), 0.01),
        ("transformer.wte.", embedding_lr * table_scale, (0.8, 0.995), 0.001),
        ("value_embeds.", 0.5 * embedding_lr * table_scale, (0.8, 0.995), 0.01),
        ("resid_lambdas", 0.01 * scalar_lr, (0.8, 0.95), 0.05),
        ("x0_lambdas", scalar_lr, (0.96, 0.95), 0.0),
        (("smear_", "backout_"), 0.2, (0.8, 0.95), 0.0),
    ]
    named, groups = dict(model.named_parameters()), []
    for prefix, lr, betas, decay in adamw:
        names = [name for name in named if name.startswith(prefix)]
        params = [named.pop(name) for name in names]
        if params:
            groups.append(dict(kind="adamw", names=names, params=params, lr=lr, betas=betas, eps=1e-10,
                               weight_decay=decay))
    for shape in sorted({tuple(p.shape) for p in named.values()}):
        names = [name for name, p in named.items() if tuple(p.shape) == shape]
        assert all(name.startswith("transformer.h.") for name in names), names
        groups.append(dict(kind="muon", names=names, params=[named[n] for n in names], lr=matrix_lr, momentum=0.95,
                           beta2=0.9, weight_decay=weight_decay))
    return MuonAdamW(groups, model.dtype, compile)
