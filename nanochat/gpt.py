"""The Transformer.

B batch, T positions, C channels (n_embd), H query heads, Hkv key/value heads, D head dim, V vocabulary.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import cpu_kernels
from nanochat import loss as loss_functions
from nanochat.common import UserError, at_least_fp32
from nanochat.flash_attention import choose_backend, flash_attn

ROTARY_BASE = 100000
CONTEXT_MARGIN = 10  # rotary tables reach this many times beyond sequence_len
QK_SCALE = 1.2
NORM_EPSILON = torch.finfo(torch.float32).eps
SMEAR_CHANNELS = 24
VE_GATE_CHANNELS = 12
CONFIG_VERSION = 1


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model; `window_pattern` tiles over the layers, L full context, S a quarter of it."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even head dim")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.n_embd < SMEAR_CHANNELS:
            raise UserError(f"n_embd={self.n_embd}: expected at least {SMEAR_CHANNELS}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window pattern {self.window_pattern!r}: expected letters S (short) and L (long), as SSSL")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64

    def windows(self) -> list[int]:
        """Previous positions that each layer sees; -1 for all."""
        short = -(-self.sequence_len // 512) * 128
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [-1 if letter == "L" else short for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        return layer % 2 == (self.n_layer - 1) % 2


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over channels, no weights; the epsilon of fp32 in every dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPSILON)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the half-split pairs of x (B, T, H, D) by minus theta; cos and sin (1 or B, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def rotary_norm(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What queries and keys go through: the rotation, the norm, the scale."""
    return QK_SCALE * norm(apply_rotary(x, cos, sin))


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., K) times weight (N, K) transposed."""
    return cpu_kernels.linear(x, weight) if cpu_kernels.fits_linear(x, weight) else F.linear(x, weight)


class Linear(nn.Linear):
    """A linear map without bias whose weight is cast to the dtype of its input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.cast: torch.Tensor | None = None  # the weight in the compute dtype, while `weights_cast_once` lasts

    def reset_parameters(self):
        """Left to `GPT.init_weights`."""

    def weight_as(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.weight if self.cast is None else self.cast
        return weight if weight.dtype == dtype else weight.to(dtype)

    def forward(self, x):
        return linear(x, self.weight_as(x.dtype))


class _TableLookup(torch.autograd.Function):
    """Rows of a table; the gradient is summed in fp32 (or more) whatever the table is stored in."""

    @staticmethod
    def forward(ctx, weight, idx):
        ctx.save_for_backward(idx)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, grad):
        (idx,) = ctx.saved_tensors
        rows, place = idx.flatten().unique(return_inverse=True)
        grad = at_least_fp32(grad.reshape(-1, ctx.shape[1]))
        total = torch.zeros(len(rows), ctx.shape[1], dtype=grad.dtype, device=grad.device).index_add_(0, place, grad)
        table = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)
        table[rows] = total.to(ctx.dtype)
        return table, None


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Likewise."""

    def forward(self, idx):
        plain = self.weight.is_cuda or not torch.is_grad_enabled()
        return F.embedding(idx, self.weight) if plain else _TableLookup.apply(self.weight, idx)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        kv_channels = self.n_kv_head * self.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_channels)
        self.c_v = Linear(config.n_embd, kv_channels)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VE_GATE_CHANNELS, self.n_kv_head) if config.has_value_embedding(layer) else None

    def project(self, x, value_embedding, cos_sin):
        """x (B, T, C) -> q (B, T, H, D), k and v (B, T, Hkv, D), ready for attention."""
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if value_embedding is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))  # (B, T, Hkv)
            v = v + gate.unsqueeze(-1) * value_embedding.view(B, T, self.n_kv_head, self.head_dim)
        return rotary_norm(q, *cos_sin), rotary_norm(k, *cos_sin), v

    def attend(self, q, k, v, window, cache):
        """What the heads see (B, T, C)."""
        if cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        else:
            y = cache.attend(q, k, v, window)
        return y.reshape(*y.shape[:2], -1)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer, in two halves around attention: those with and without a value embedding share the compiled second one.

    `block` in cpu_decoding.c is the same for one new position on CPUs: what changes here must change there.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def begin(self, x, x0, resid_lambda, x0_lambda, value_embedding, cos_sin):
        """Up to attention -> residual stream, q, k, v."""
        x = resid_lambda * x + x0_lambda * x0
        return x, *self.attn.project(norm(x), value_embedding, cos_sin)

    def close(self, x, y):
        """After attention, which saw y (B, T, C) -> residual stream."""
        x = x + self.attn.c_proj(y)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Decoder-only Transformer, its weights not yet filled: see `build_model`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.windows = config.windows()
        padded = config.padded_vocab_size
        self.transformer = nn.ModuleDict({
            "wte": Embedding(padded, config.n_embd),
            "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
        })
        self.lm_head = Linear(config.n_embd, padded)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.value_embeds = nn.ModuleDict({
            str(i): Embedding(padded, config.n_kv_head * config.head_dim)
            for i in range(config.n_layer) if config.has_value_embedding(i)
        })
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self._begin, self._close = Block.begin, Block.close
        self.decode_halves = None  # a compiled `begin` and `close` for one new position a row, on GPUs
        self._train_features = self.features
        self._loss_gradient = loss_functions.softmax_gradient_

    # --- set-up ---

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.cos.dtype

    @torch.no_grad()
    def init_weights(self, dtype: torch.dtype = torch.float32) -> None:
        """Fill every parameter and set the compute dtype (tables are stored in it, except under fp16)."""
        config, bound = self.config, (3 / self.config.n_embd) ** 0.5  # uniform(-bound, bound) has std 1/sqrt(C)
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0, 0.02)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, config.n_layer))
        self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, config.n_layer))
        nn.init.uniform_(self.smear_gate.weight, 0, 0.02)
        self.smear_lambda.fill_(0.0)
        self.backout_lambda.fill_(0.2)
        self.set_compute_dtype(dtype)

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from now on: rotary tables, and embeddings unless it is fp16."""
        choose_backend(self.device.type, dtype)
        self._loss_gradient = loss_functions.softmax_gradient_on(self.device, dtype)
        self.cos, self.sin = (t.to(dtype) for t in self._rotary(self.device))
        if dtype != torch.float16:
            self.transformer.wte.to(dtype)
            self.value_embeds.to(dtype)

    def _rotary(self, device):
        dim = self.config.head_dim
        frequencies = ROTARY_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        positions = torch.arange(CONTEXT_MARGIN * self.config.sequence_len, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies)
        return angles.cos(), angles.sin()

    def for_inference(self) -> "GPT":
        """Cast every weight to the compute dtype, once; not to be trained afterwards."""
        for module in self.modules():
            if isinstance(module, (Linear, Embedding)):
                module.to(self.dtype)
        return self.eval().requires_grad_(False)

    @contextlib.contextmanager
    def weights_cast_once(self):
        """For evaluation and sampling between training steps: weights are cast here, not on every call."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        for linear in linears:
            linear.cast = linear.weight.detach().to(self.dtype)
        try:
            yield self
        finally:
            for linear in linears:
                linear.cast = None

    def compile(self) -> None:
        """Compile the training path: the whole trunk on CUDA, the blocks around attention (quick to compile) elsewhere."""
        if self.device.type == "cuda":
            self._train_features = torch.compile(self.features, dynamic=False)
        else:
            self._begin, self._close = (torch.compile(half, dynamic=False) for half in (Block.begin, Block.close))
        if self._loss_gradient is loss_functions.softmax_gradient_:
            self._loss_gradient = torch.compile(self._loss_gradient, dynamic=False)

    # --- forward ---

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        """Logits (B, T, V) in fp32 for idx (B, T), or with targets (B, T; -1 ignored) the loss, `loss_reduction`d."""
        compiled = kv_cache is None and (torch.is_grad_enabled() or self.device.type == "cuda")
        features = self._train_features(idx) if compiled else self.features(idx, kv_cache)  # (B, T, C)
        if targets is None:
            return self.logits(features)
        weight = self._unpadded(self.lm_head.weight if torch.is_grad_enabled() else
                                self.lm_head.weight_as(features.dtype))
        return loss_functions.softcap_cross_entropy(features.flatten(0, 1), weight, targets.flatten(), loss_reduction,
                                                    gradient_fn=self._loss_gradient)

    def log_probabilities(self, idx, targets, temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
        """Log-probabilities (N,) of the targets (B, T) that are not -1, in their order, under what sampling draws from;
        with gradients."""
        learnt = targets.flatten() >= 0
        features = self._train_features(idx).flatten(0, 1)[learnt]
        return loss_functions.log_probabilities(features, self._unpadded(self.lm_head.weight), targets.flatten()[learnt],
                                                temperature, top_k)

    def next_logits(self, idx, kv_cache=None):
        """Logits (B, V) in fp32 after the last position of idx (B, T)."""
        features = self.features(idx, kv_cache)[:, -1]
        return self.logits(features)

    def logits(self, features: torch.Tensor, tokens: list[int] | None = None) -> torch.Tensor:
        """Features (..., C) -> logits (..., V) in fp32, without the padding of the vocabulary; or those of some tokens only."""
        weight = self._unpadded(self.lm_head.weight_as(features.dtype))
        weight = weight if tokens is None else weight[tokens]
        if cpu_kernels.fits_linear(features, weight):
            return cpu_kernels.softcap(cpu_kernels.linear(features, weight), loss_functions.SOFTCAP)
        return loss_functions.softcap(F.linear(features, weight))

    def _unpadded(self, weight: torch.Tensor) -> torch.Tensor:
        """The head's rows of real tokens; a slice only where there is padding, since its gradient costs a copy."""
        return weight if len(weight) == self.config.vocab_size else weight[:self.config.vocab_size]

    def _smear(self, x, previous):
        """Add the gated predecessor to every position: x (B, T, C), previous (B, T, C)."""
        return x + self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS])) * previous

    def features(self, idx, kv_cache=None):
        T = idx.size(1)
        x = norm(self.transformer.wte(idx).to(self.dtype))
        if kv_cache is None:
            x = torch.cat((x[:, :1], self._smear(x[:, 1:], x[:, :-1])), dim=1)
            cos_sin = self.cos[None, :T, None], self.sin[None, :T, None]
        else:
            kv_cache = kv_cache.for_pass()
            positions, last = kv_cache.positions(T), kv_cache.last_tokens()  # (B, T), (B,)
            cos_sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
            first = norm(self.transformer.wte(last.clamp(min=0)).to(self.dtype)) * (last >= 0)[:, None]
            x = self._smear(x, torch.cat((first[:, None], x[:, :-1]), dim=1))
        x0, middle = x.clone(), None  # a copy: the same tensor twice would make layer 0 compile on its own
        begin, close = Block.begin, Block.close
        if kv_cache is None and torch.is_grad_enabled():
            begin, close = self._begin, self._close
        elif kv_cache is not None and T == 1 and self.decode_halves is not None:
            begin, close = self.decode_halves
        in_c = kv_cache is not None and kv_cache.counts is None and cpu_kernels.fits_block(x, self.config.head_dim)
        resid_lambdas, x0_lambdas = (p.tolist() if in_c else p.unbind() for p in (self.resid_lambdas, self.x0_lambdas))
        for i, block in enumerate(self.transformer.h):
            table = self.value_embeds[str(i)] if str(i) in self.value_embeds else None
            value_embedding = None if table is None else table(idx).to(self.dtype)
            cache = None if kv_cache is None else kv_cache.layer(i)
            if in_c:
                x = cpu_kernels.block(block, x, x0, (resid_lambdas[i], x0_lambdas[i]), value_embedding, cos_sin,
                                      self.windows[i], cache, QK_SCALE, NORM_EPSILON)
            else:
                x, q, k, v = begin(block, x, x0, resid_lambdas[i], x0_lambdas[i], value_embedding, cos_sin)
                x = close(block, x, block.attn.attend(q, k, v, self.windows[i], cache))
            if i == self.config.n_layer // 2:
                middle = x
        if kv_cache is not None:
            kv_cache.advance(idx)
        return norm(x - self.backout_lambda.to(x.dtype) * middle)


def build_model(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPT:
    """A freshly initialised model on `device`, computing in `dtype`."""
    with device:  # not on the meta device, whose `to_empty` imports PyTorch's compiler, which takes seconds
        model = GPT(config)
    model.init_weights(dtype)
    return model
