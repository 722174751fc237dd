"""Compute linear layers on the CPU with oneDNN where torch's default, MKL, is half as fast.

On processors that are not Intel's, MKL uses AVX2. oneDNN, which torch includes too, uses AVX-512 and computes the same
float32 products at 200 instead of 100 GFLOP/s on one core (bench/linear.py).
Shapes: x (..., K), weight (N, K), result (..., N).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# With fewer multiplications in a product, the overhead of calling oneDNN outweighs the gain.
WORTHWHILE = 1 << 21
PLAIN = (Tensor, nn.Parameter)
INSTRUCTIONS = {  # as torch.cpu.get_capabilities names them, of x86 and of ARM
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}


@contextmanager
def fast_linear_layers() -> Iterator[None]:
    """Within the `with` block, compute larger float32 products of every `nn.Linear` with oneDNN if that is faster.

    The class is changed, not the models, so a copy of a model that is made in the block is an ordinary one.
    `torch.backends.mkldnn.enabled = False` disables this.
    """
    if not onednn_is_faster():
        yield
        return
    plain = nn.Linear.forward
    nn.Linear.forward = _forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Linear.forward = plain  # type: ignore[method-assign]


def onednn_is_faster() -> bool:
    """Return True on processors on which oneDNN is known to be faster.

    Speed is not measured, since a resumed run must compute the same bits.
    """
    return bool(torch.backends.mkldnn.enabled) and _slow_mkl()


@cache
def _slow_mkl() -> bool:
    processor = str(torch.cpu.get_capabilities().get("cpu_name", ""))
    return (
        processor.startswith("AMD")
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def has_instructions_for(dtype: torch.dtype) -> bool:
    """Return True if this CPU has instructions for products in this dtype.

    Without them a product in half precision takes 2.4 to 6.2 times as long as in float32 (bench/results/benchmarks.md).
    """
    able = torch.cpu.get_capabilities()
    return dtype not in INSTRUCTIONS or any(able.get(name, False) for name in INSTRUCTIONS[dtype])


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if not _suits(x, weight) or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        product: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return _multiply(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Return True if both are large plain float32 tensors on the CPU, neither shards nor quantised."""
    return (
        type(weight) in PLAIN
        and type(x) in PLAIN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= WORTHWHILE
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, without gradients; within `fast_linear_layers`, with oneDNN where that is faster."""
    if nn.Linear.forward is _forward and _suits(x, weight):
        return _multiply(x, weight, bias)
    return functional.linear(x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Only the weight's gradient needs the input, so it is not kept if the weight is frozen, as under LoRA.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            _multiply(grad, weight.t()) if of_x else None,
            _multiply(flat.t(), x.reshape(-1, x.shape[-1]).t()) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )
