"""Autograd of the attention ops: each has one backward op, which cannot be differentiated itself.

A forward op takes (query, key, bound, value, grid, window), where "query" may be a block's whole
projection, and returns its output and what else backward needs. Its backward op takes (grad, query,
key, value, *outputs, grid, window) and returns the gradients of query, key and value.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def register_gradients(forward: Any, backward: Any) -> None:
    """Make ``backward`` the gradient of ``forward``, with its fake, and refuse a second one."""
    backward.register_fake(_fake_gradients)
    backward.register_autograd(refuse_second_derivative)

    def differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_query, d_key, d_value = backward(grad, *ctx.saved_tensors, ctx.grid, ctx.window)
        return d_query, d_key, None, d_value, None, None

    forward.register_autograd(differentiate, setup_context=_setup_context)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, _, value, ctx.grid, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(*output[1:])


def _fake_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The gradient of a backward op: there is none."""
    raise RuntimeError(
        "the Triton kernels cannot be differentiated twice; use backend='dense' for that"
    )
