"""bf16 products in float32 arithmetic, for CPUs that have no bf16 instructions.

There torch emulates bf16 matrix products, 6 to 80 times slower than float32. A product of bf16
numbers is exact in float32, so it may as well be computed there: operands are converted for each
product, forward and backward, and the result is rounded to bf16 once. What is stored and what is
kept for the backward pass stays bf16.

The place is torch's own table of what autocast does to an operation ("AutocastCPU"), because that
is where the precision of a product is decided: it reaches every layer, and an activation checkpoint
that computes a layer again in the backward pass restores autocast and with it these products.
Outside autocast nothing changes; under autocast to another dtype they do what torch does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

BF16 = torch.bfloat16

_library: torch.library.Library | None = None


def enable() -> None:
    """From now on, products under bf16 autocast on the CPU are computed in float32.

    For the whole process, until disable(): backward passes run outside of any context.
    """
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # "Overriding a previously registered kernel": on purpose
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")
        for name, function in _PRODUCTS.items():
            _library.impl(name, function, "AutocastCPU")


def disable() -> None:
    """Gives torch's own products back. A backward pass of an earlier forward stays in float32."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def is_enabled() -> bool:
    """Whether enable() is in force."""
    return _library is not None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or x.dim() == 0 or not _takes(x, weight, bias):
        return _as_torch_does(nn.functional.linear, x, weight, bias)
    out = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias, True)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if min(a.dim(), b.dim()) < 2 or not _takes(a, b):
        return _as_torch_does(torch.matmul, a, b)
    if b.dim() == 2:  # one product of all rows
        out = _Product.apply(a.reshape(-1, a.shape[-1]), b, None, False)
        return out.reshape(*a.shape[:-1], b.shape[1])
    return _Product.apply(a, b, None, False)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if not _takes(a, b):
        return _as_torch_does(torch.mm, a, b)
    return _Product.apply(a, b, None, False)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if not _takes(a, b):
        return _as_torch_does(torch.bmm, a, b)
    return _Product.apply(a, b, None, False)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    if (beta, alpha) != (1, 1) or not _takes(a, b, bias):
        return _as_torch_does(torch.addmm, bias, a, b, beta=beta, alpha=alpha)
    return _Product.apply(a, b, bias, False)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not _takes(query, key, value):
        return _as_torch_does(
            scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, **options
        )
    # A second forward pass would drop other weights, and gives no gradient of the mask.
    if dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad):
        with torch.autocast("cpu", enabled=False):
            inputs = [_exact(x) for x in (query, key, value)]
            out = scaled_dot_product_attention(
                *inputs, _float_mask(attn_mask), dropout_p, **options
            )
            return out.to(BF16)
    return _Attention.apply(query, key, value, attn_mask, options)


#: Operations of the aten library whose autocast rule is replaced.
_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _mm,
    "bmm": _bmm,
    "addmm": _addmm,
    "scaled_dot_product_attention": _attention,
}


class _Product(torch.autograd.Function):
    """a @ b + bias, or a @ b.T + bias, rounded to bf16.

    Kept for backward: a and b in bf16, a parameter as it is. Gradients have the dtype of what they
    belong to: that of a float32 weight is not rounded to bf16 on its way.

    Args:
        a: float [..., M, K].
        b: float [..., K, N]; [N, K] where ``transposed``.
        bias: float, added to the last dimensions of the product, or None.
        transposed: whether b is.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        ctx.dtypes = (a.dtype, b.dtype)
        ctx.bias = None if bias is None else (bias.dtype, bias.shape)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            # Only what the other one's gradient needs.
            ctx.save_for_backward(
                _stored(a) if ctx.needs_input_grad[1] else None,
                _stored(b) if ctx.needs_input_grad[0] else None,
            )
            ctx.shapes = (a.shape, b.shape)
        with torch.autocast("cpu", enabled=False):
            a, b = _exact(a), _exact(b)
            out = a @ (b.mT if transposed else b)
            if bias is not None:
                out += _exact(bias)
            return out.to(BF16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_a = grad_b = grad_bias = None
        with torch.autocast("cpu", enabled=False):
            grad = grad.float()
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                a, b = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                b = _exact(b)
                grad_a = grad @ (b if ctx.transposed else b.mT)
                grad_a = grad_a.sum_to_size(ctx.shapes[0]).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                a = _exact(a)
                grad_b = grad.mT @ a if ctx.transposed else a.mT @ grad
                grad_b = grad_b.sum_to_size(ctx.shapes[1]).to(ctx.dtypes[1])
            if ctx.needs_input_grad[2]:
                dtype, shape = ctx.bias
                grad_bias = grad.sum_to_size(shape).to(dtype)
        return grad_a, grad_b, grad_bias, None


class _Attention(torch.autograd.Function):
    """scaled_dot_product_attention, rounded to bf16; computed again in the backward pass.

    Kept for backward: query, key and value in bf16. torch's kernel would keep them, its output and
    its sums in float32, twice the memory, to save a quarter of attention's time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.options = options
        ctx.dtypes = (query.dtype, key.dtype, value.dtype)
        ctx.save_for_backward(query.to(BF16), key.to(BF16), value.to(BF16), attn_mask)
        with torch.autocast("cpu", enabled=False):
            inputs = [_exact(x) for x in (query, key, value)]
            mask = _float_mask(attn_mask)
            return scaled_dot_product_attention(*inputs, attn_mask=mask, **options).to(BF16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, attn_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            inputs = [x.float().detach().requires_grad_(needs) for x, needs in zip(inputs, needed)]
            out = scaled_dot_product_attention(
                *inputs, attn_mask=_float_mask(attn_mask), **ctx.options
            )
            wanted = [x for x in inputs if x.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, grad.float()))
        gradients = [
            next(found).to(dtype) if needs else None for needs, dtype in zip(needed, ctx.dtypes)
        ]
        return (*gradients, None, None)


def _takes(*tensors: Tensor | None) -> bool:
    """Whether these are operands that autocast would cast to bf16.

    Tensor subclasses (quantised weights, those torch.compile traces with) go torch's way.
    """
    return torch.get_autocast_dtype("cpu") == BF16 and all(
        type(t) in (Tensor, nn.Parameter)
        and t.is_floating_point()
        and t.dtype != torch.float64
        and t.layout == torch.strided
        and t.is_cpu
        for t in tensors
        if t is not None
    )


def _as_torch_does(function: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    """The function in the dtype of autocast: what torch's own rule does."""
    dtype = torch.get_autocast_dtype("cpu")

    def cast(value: Any) -> Any:
        takes = isinstance(value, Tensor) and value.is_floating_point() and value.is_cpu
        return value.to(dtype) if takes and value.dtype != torch.float64 else value

    with torch.autocast("cpu", enabled=False):
        return function(*map(cast, inputs), **options)


def _exact(operand: Tensor) -> Tensor:
    """The operand rounded to bf16, as float32."""
    return operand.to(BF16).float()


def _stored(operand: Tensor) -> Tensor:
    """The operand in bf16; a parameter itself, which is there anyway and need not be copied."""
    return operand if operand.is_leaf and operand.requires_grad else operand.to(BF16)


def _float_mask(mask: Tensor | None) -> Tensor | None:
    """A bool mask as it is, one of numbers in the dtype of the scores."""
    return _exact(mask) if mask is not None and mask.is_floating_point() else mask
