"""Train linear layers with LoRA adapters on the CPU, each as one operation of autograd, in the layer's own dtype.

peft computes an adapter in float32. Beside a base in bfloat16 it casts what each layer reads and what it adds, and the
adapter's products run at a fifth of the speed where the processor has bfloat16 products (AMX). Here the factors are
cast once per forward pass, and stay float32 for the optimiser, as under mixed precision; in float32 the adapter is
added in place. `bench/lora_step.py` measures it.
Shapes: x (..., K), weight (N, K), factors A (R, K) and B (N, R), result (..., N).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as AdaptedLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from forgetlearn.models import onednn


@contextmanager
def fused_adapters() -> Iterator[None]:
    """Within the `with` block, train the adapted linear layers of all models on the CPU as `_Adapted`.

    peft's class is changed, not the models, as in `onednn.fast_linear_layers`. What `_Adapted` cannot compute (dropout,
    variants such as DoRA, weights that are split or quantised, mixed precision) and what is not trained stays peft's.
    """
    plain = AdaptedLinear.forward

    def forward(layer: AdaptedLinear, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if args or options or not _suits(layer, x):
            given: Tensor = plain(layer, x, *args, **options)
            return given
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        factors = [part[name].weight for name in names for part in (layer.lora_A, layer.lora_B)]
        scalings = [layer.scaling[name] for name in names]
        own = layer.get_base_layer()
        out: Tensor = _Adapted.apply(x, own.weight, own.bias, scalings, *factors)  # type: ignore[no-untyped-call]
        return out

    AdaptedLinear.forward = forward
    try:
        yield
    finally:
        AdaptedLinear.forward = plain


def _suits(layer: AdaptedLinear, x: Tensor) -> bool:
    own = layer.get_base_layer()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    parts = [part[name] for name in names for part in (layer.lora_A, layer.lora_B)]
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not (layer.disable_adapters or layer.merged or layer.fan_in_fan_out)
        and type(own) is nn.Linear
        and own.weight.dtype == x.dtype
        and not any(weight.requires_grad for weight in own.parameters())
        and all(type(part) is nn.Linear and part.bias is None for part in parts)
        and all(_is_plain(module.weight) and not _is_watched(module) for module in (own, *parts))
        and all(not layer.lora_variant.get(name) and _drops_nothing(layer.lora_dropout[name]) for name in names)
    )


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in onednn.PLAIN and weight.is_floating_point()


def _is_watched(module: nn.Module) -> bool:
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_hooks or module._backward_pre_hooks)


def _drops_nothing(dropout: nn.Module) -> bool:
    return not _is_watched(dropout) and (isinstance(dropout, nn.Identity) or not dropout.training)


class _Adapted(torch.autograd.Function):
    """x @ weight.T + bias + the sum of scaling * (x @ A.T) @ B.T, and its gradients; the weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scalings: list[float], *factors: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = onednn.linear(rows, weight, bias)
        kept: list[Tensor] = []
        for a, b, scaling in _adapters(factors, scalings):
            small_a, small_b = a.to(x.dtype), b.to(x.dtype)
            inner = onednn.linear(rows, small_a).mul_(scaling)
            out.addmm_(inner, small_b.t())
            kept += (small_a, small_b, inner)
        trains_a = any(ctx.needs_input_grad[4::2])
        ctx.scalings, ctx.shape = scalings, x.shape
        ctx.save_for_backward(rows if trains_a else None, weight, *kept)
        # A plain view is one that the model could not change in place, as some do.
        shaped: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *kept = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        of_x = onednn.linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_factors: list[Tensor | None] = []
        for number, scaling in enumerate(ctx.scalings):
            a, b, inner = kept[3 * number : 3 * number + 3]
            trains_a, trains_b = ctx.needs_input_grad[4 + 2 * number : 6 + 2 * number]
            of_inner = (grad @ b).mul_(scaling)
            if of_x is not None:
                of_x.addmm_(of_inner, a)
            # The factors are float32, and so must be their gradients.
            of_factors.append((of_inner.t() @ rows).float() if trains_a else None)
            of_factors.append((grad.t() @ inner).float() if trains_b else None)
        return of_x.view(ctx.shape) if of_x is not None else None, None, None, None, *of_factors


def _adapters(factors: tuple[Tensor, ...], scalings: list[float]) -> Iterator[tuple[Tensor, Tensor, float]]:
    return zip(factors[::2], factors[1::2], scalings, strict=True)
