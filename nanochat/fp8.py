"""Float8 training: torchao's scaled matrix products in the blocks' linear layers, and a way to switch them off."""

import contextlib

import torch

from nanochat.common import Runtime, UserError
from nanochat.gpt import GPT, Linear, linear

MIN_CAPABILITY = (8, 9)
MIN_SIZE = 128  # below this, casting costs more than the product saves


def check_fp8(runtime: Runtime) -> None:
    """UserError unless this device can multiply in float8."""
    if runtime.device.type != "cuda":
        raise UserError(f"--fp8 needs an NVIDIA GPU (H100, Ada or newer); this run is on {runtime.device.type}: leave it out")
    capability = torch.cuda.get_device_capability(runtime.device)
    if capability < MIN_CAPABILITY:
        raise UserError(f"--fp8 needs compute capability 8.9 or more, this GPU has {capability[0]}.{capability[1]}: leave it "
                        "out")
    if runtime.dtype != torch.bfloat16:
        raise UserError(f"--fp8 goes with bfloat16, not {runtime.dtype}: unset NANOCHAT_DTYPE")


def _eligible(module: torch.nn.Module, name: str) -> bool:
    """Linear layers of the blocks whose sizes the float8 kernels take; the head goes with the fused loss instead."""
    return (isinstance(module, Linear) and name.startswith("transformer.h.")
            and all(n % 16 == 0 and n >= MIN_SIZE for n in module.weight.shape))


def convert_to_fp8(model: GPT, emulate: bool = False) -> int:
    """Exchange the eligible layers, in place, parameters and their names untouched -> number of layers.

    Tensorwise dynamic scaling. `emulate` computes in higher precision what float8 would give, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = {name for name, module in model.named_modules() if _eligible(module, name)}
    convert_to_float8_training(model, module_filter_fn=lambda module, name: name in names,
                               config=Float8LinearConfig(emulate=emulate))
    return len(names)


@contextlib.contextmanager
def fp8_disabled(model: GPT):
    """Evaluate and sample in the compute dtype, with the same weights."""
    from torchao.float8.float8_linear import Float8Linear

    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    for layer in layers:
        layer.forward = lambda x, weight=layer.weight: linear(x, weight.to(x.dtype))
    try:
        yield model
    finally:
        for layer in layers:
            del layer.forward
