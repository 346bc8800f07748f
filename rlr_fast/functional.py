"""The two attention operators: argument checks and the choice of a backend.

The paths behind them (`rlr_fast.ops.dense`, `rlr_fast.ops.tiled`, `rlr_fast.kernels`) never import
each other; they meet here.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlr_fast.config import Backend, window_pair
from rlr_fast.ops import dense, tiled

try:
    from rlr_fast import kernels
except ModuleNotFoundError as error:  # Triton is not to be had on every platform
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    kernels = None  # type: ignore[assignment]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DTYPE_NAMES = "float32, float64, bfloat16 or float16"

_Operator = Callable[[Tensor, Tensor, Tensor, tuple[int, int], tuple[int, int], float], Tensor]
_LCA: dict[str, _Operator] = {
    "tiled": tiled.local_cross_attention,
    "dense": dense.local_cross_attention,
}
_MLKA: dict[str, _Operator] = {
    "tiled": tiled.masked_learnable_key_attention,
    "dense": dense.masked_learnable_key_attention,
}
if kernels is not None:
    _LCA["triton"] = kernels.local_cross_attention
    _MLKA["triton"] = kernels.masked_learnable_key_attention


# Asked once: PyTorch 2.11 cannot trace the question.
_HAS_AUTOCAST = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))


class BackendError(RuntimeError):
    """The requested backend cannot run here, or not on these tensors."""


def local_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: int | Sequence[int],
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend to the keys inside a window around each token (LCA, eq. 10-12).

    ``output_i = Σ_j softmax_j(scale · q_i · k_j) v_j`` over the keys j with
    ``|Δy| <= window[0] // 2`` and ``|Δx| <= window[1] // 2``. Token i lies at ``(i // W, i % W)``;
    the window is clipped at the border.

    Args:
        query: (B, h, N, d); float32, float64, bfloat16 or float16.
        key: (h, N, d), shared over the batch, or (B, h, N, d).
        value: (h, N, d), shared over the batch, or (B, h, N, d), independently of ``key``.
        grid: Token grid (H, W), N = H·W.
        window: Odd side, or (height, width), in tokens.
        scale: Factor of the scores; ``None`` is ``d**-0.5``.
        backend: ``"auto"`` takes the fastest path that runs here; any other is honored or refused.

    Returns:
        (B, h, N, d) in the query's dtype, or in autocast's where that is on (but float64 stays).

    Raises:
        ValueError: An argument breaks a rule above; the message names it.
        BackendError: The requested backend cannot run here.
        RuntimeError: A derivative that the Triton kernels lack: see `refuse_transforms`.
    """
    return _apply(_LCA, query, key, value, grid, window, scale, backend)


def masked_learnable_key_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: int | Sequence[int],
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend to the keys outside a window around each token (MLKA, eq. 7-9).

    ``output_i = Σ_j softmax_j(scale · q_i · k_j) v_j`` over the keys j with
    ``|Δy| > window[0] // 2`` or ``|Δx| > window[1] // 2``. Token i lies at ``(i // W, i % W)``; the
    window is clipped at the border. A token whose window covers the grid has no key: its output is
    0 and it gives no gradient.

    Args:
        query: (B, h, N, d); float32, float64, bfloat16 or float16.
        key: (h, N, d), shared over the batch, or (B, h, N, d).
        value: (h, N, d), shared over the batch, or (B, h, N, d), independently of ``key``.
        grid: Token grid (H, W), N = H·W.
        window: Odd side, or (height, width), in tokens.
        scale: Factor of the scores; ``None`` is ``d**-0.5``.
        backend: ``"auto"`` takes the fastest path that runs here; any other is honored or refused.

    Returns:
        (B, h, N, d) in the query's dtype, or in autocast's where that is on (but float64 stays).

    Raises:
        ValueError: An argument breaks a rule above; the message names it.
        BackendError: The requested backend cannot run here.
        RuntimeError: A derivative that the Triton kernels lack: see `refuse_transforms`.
    """
    return _apply(_MLKA, query, key, value, grid, window, scale, backend)


def unsupported_reason(backend: str, device: torch.device | str) -> str | None:
    """Say why ``backend`` cannot run on ``device``; ``None`` if it can.

    Raises:
        ValueError: There is no such backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend=}")
    if backend != "triton":
        return None
    if kernels is None:
        return "the package triton is not installed"
    return kernels.unsupported_device(device)


def require_head_width(backend: str, width: int) -> None:
    """Check before any work that ``backend`` has an operator for the head width d.

    Raises:
        BackendError: It has none.
    """
    if backend == "triton" and kernels is not None:
        reason = kernels.unsupported_width(width)
        if reason is not None:
            raise BackendError(f"backend 'triton' cannot run here: {reason}")


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """Return the path to take on ``device``: "triton", "tiled" or "dense".

    Raises:
        ValueError: There is no such backend.
        BackendError: ``backend`` is a path that cannot run on ``device``.
    """
    if unsupported_reason(backend, device) is None and backend != "auto":
        return backend
    return _resolved(backend, device, unsupported_reason("triton", device))


class PreparedReference(NamedTuple):
    """A block's part of the learnable reference, ready for any number of images.

    Attributes:
        keys: (2h, N, d), MLKA's heads, then LCA's.
        value: (h, N, d), LCA's.
        bound: (2h,), the largest norm of a head's keys, which are then centered and in log2 units,
            as the Triton kernels take them; ``None``: the keys are as projected.
        path: The path to take, "triton", "tiled" or "dense".
        backend: As it was asked for.
    """

    keys: Tensor
    value: Tensor
    bound: Tensor | None
    path: str
    backend: str


def prepare_reference(
    projected: Tensor, heads: int, backend: Backend = "auto"
) -> PreparedReference:
    """Do what the operators need of the reference, once for all images.

    Args:
        projected: (N, 3C) = [k_mlka | k_lca | v_lca].
        heads: Attention heads h, C = h·d.
        backend: As for the operators.

    Raises:
        ValueError: Another shape, or there is no such backend.
        BackendError: The requested backend cannot run here.
        RuntimeError: A derivative that the Triton kernels lack: see `refuse_transforms`.
    """
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive integer, got {heads=}")
    if projected.dim() != 2 or projected.shape[1] % (3 * heads) or 0 in projected.shape:
        raise ValueError(
            f"projected must be (N, 3·h·d) with {heads=} h, got shape {tuple(projected.shape)}"
        )
    if projected.dtype not in DTYPES:
        raise ValueError(f"projected must be {_DTYPE_NAMES}, got dtype {projected.dtype}")
    parts = projected.unflatten(-1, (3 * heads, -1)).transpose(0, 1)  # (3h, N, d)
    keys, value = parts[: 2 * heads], parts[2 * heads :]
    path = _path(backend, keys[None], (keys, value))
    if path != "triton":
        return PreparedReference(keys, value, None, path, backend)
    refuse_transforms(projected)
    prepared, bound = kernels.prepare_key(keys, keys.shape[2] ** -0.5)
    return PreparedReference(prepared, value, bound, path, backend)


def block_attention(
    projected: Tensor,
    reference: PreparedReference,
    grid: tuple[int, int],
    window: int | Sequence[int],
) -> Tensor:
    """Both attentions of a block: ``[MLKA(q, k, v) | LCA(q, k, v)]``.

    Args:
        projected: (B, N, 3C) = [q_mlka | v_mlka | q_lca].
        reference: Of the same block.
        grid: Token grid (H, W), N = H·W.
        window: Odd side, or (height, width), in tokens.

    Returns:
        (B, N, 2C), MLKA's output beside LCA's.

    Raises:
        ValueError: ``projected`` has another shape, dtype or device than ``reference`` asks for, or
            ``grid`` or ``window`` breaks its rule.
        BackendError: The GPU refuses the kernels that the reference was prepared for by request.
        RuntimeError: A derivative that the Triton kernels lack: see `refuse_transforms`.
    """
    heads, tokens, width = reference.value.shape
    kind = (reference.value.dtype, reference.value.device)
    if projected.dim() != 3 or tuple(projected.shape[1:]) != (tokens, 3 * heads * width):
        raise ValueError(
            f"projected must be (B, {tokens}, {3 * heads * width}) as the reference, "
            f"got shape {tuple(projected.shape)}"
        )
    if (projected.dtype, projected.device) != kind:
        raise ValueError(
            f"projected must be {kind[0]} on {kind[1]} as the reference, "
            f"got {projected.dtype} on {projected.device}"
        )
    grid = _check_grid(grid, tokens)
    window = _clipped(window_pair(window), grid)
    query, value, local = projected.unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
    keys, local_keys = reference.keys.chunk(2)
    path: Backend = reference.path  # type: ignore[assignment]
    scale = None
    if reference.bound is not None:
        refuse_transforms(projected, reference.keys, reference.value)
        tensors = (projected, reference.keys, reference.value)
        reason = _refusal("mlka", query, value, tensors, grid, window)
        reason = reason or _refusal("lca", local, reference.value, tensors, grid, window)
        if reason is None:
            return kernels.block_attention(
                projected, reference.keys, reference.bound, reference.value, grid, window
            )
        # The prepared keys are in log2 units: 2**s is exp(ln 2 · s).
        path, scale = _without_kernels(reference.backend, reason), math.log(2)
    device = projected.device
    lowered = autocast_dtype(device) is not None
    # As the kernels: in the dtype that both have.
    with torch.autocast(device.type, enabled=False) if lowered else contextlib.nullcontext():
        outputs = (
            masked_learnable_key_attention(query, keys, value, grid, window, scale, path),
            local_cross_attention(local, local_keys, reference.value, grid, window, scale, path),
        )
    return torch.cat([output.transpose(1, 2) for output in outputs], 2).flatten(2)


def _path(backend: str, query: Tensor, shared: Sequence[Tensor]) -> str:
    """Return the path for these tensors; the kernels need ``shared`` without a batch."""
    reason = unsupported_reason(backend, query.device)
    if backend in ("auto", "triton") and kernels is not None:
        reason = kernels.unsupported_reason(query, *shared)
    return _resolved(backend, query.device, reason)


def _resolved(backend: str, device: torch.device | str, reason: str | None) -> str:
    """Choose by the reason why the kernels cannot run, ``None`` if they can."""
    if backend == "auto":
        # Triton's interpreter runs kernels on a CPU, for proof and not for speed.
        slow = torch.device(device).type == "cpu"
        return "tiled" if slow or kernels is None or reason is not None else "triton"
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run here: {reason}")
    return backend


def _refusal(
    name: str,
    query: Tensor,
    value: Tensor,
    tensors: Sequence[Tensor],
    grid: tuple[int, int],
    window: tuple[int, int],
) -> str | None:
    """Say why the GPU refuses the kernels of an operator; ``None`` if it takes them."""
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return kernels.refusal(name, query, value, grid, window, backward)


def _without_kernels(backend: str, reason: str) -> Backend:
    """Return the path to take where the GPU refuses the kernels.

    Raises:
        BackendError: The kernels were asked for.
    """
    if backend == "triton":
        raise BackendError(f"backend 'triton' cannot run here: {reason}")
    _warn_once(f"backend 'auto' goes on with 'tiled', for the Triton kernels cannot run: {reason}")
    return "tiled"


_TOLD: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _TOLD:
        _TOLD.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


# As `torch.compiler.assume_constant_result`, whose import of the compiler takes seconds.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _apply(
    paths: dict[str, _Operator],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: int | Sequence[int],
    scale: float | None,
    backend: str,
) -> Tensor:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {_kind(tensor)}")
    dtype = autocast_dtype(query.device)
    if dtype is not None:
        query, key, value = (_lowered(x, dtype) for x in (query, key, value))
        # Off inside, or autocast would cast every mask of every call again.
        with torch.autocast(query.device.type, enabled=False):
            return _apply(paths, query, key, value, grid, window, scale, backend)
    _check_tensors(query, key, value)
    height, width = _check_grid(grid, query.shape[2])
    if scale is None:
        scale = query.shape[3] ** -0.5
    elif not isinstance(scale, (int, float)):
        raise ValueError(f"scale must be a number, got {scale=}")
    elif not abs(scale) <= torch.finfo(query.dtype).max:  # NaN is not either
        raise ValueError(f"scale must be finite in {query.dtype}, got {scale=}")
    shared = (key, value) if paths is _LCA else (key,)
    path = _path(backend, query, shared)
    window = _clipped(window_pair(window), (height, width))
    if path == "triton":
        refuse_transforms(query, key, value)
        name, tensors = "lca" if paths is _LCA else "mlka", (query, key, value)
        reason = _refusal(name, query, value, tensors, (height, width), window)
        if reason is not None:
            path = _without_kernels(backend, reason)
    return paths[path](query, key, value, (height, width), window, float(scale))


def _kind(value: object) -> str:
    return str(value.layout) if isinstance(value, Tensor) else type(value).__name__


def _clipped(window: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest window that sees as much of the grid."""
    return min(window[0], 2 * grid[0] - 1), min(window[1], 2 * grid[1] - 1)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast computes in on ``device`` at present; None where it is off."""
    if device.type in _HAS_AUTOCAST and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def refuse_transforms(*tensors: Tensor) -> None:
    """Refuse tangents, which the kernels' ops would drop, and `torch.func`'s gradients of them.

    Raises:
        RuntimeError: A tensor has a tangent, or is inside of `torch.func.grad` and its like.
    """
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "the Triton kernels have no forward-mode derivative; use backend='dense' for that"
        )
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == torch._C._functorch.TransformType.Grad for level in levels):
        raise RuntimeError(
            "torch.func does not differentiate the Triton kernels; use torch.autograd, or "
            "backend='tiled' or 'dense'"
        )


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast casts the inputs of PyTorch's own attention: float64 stays."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4 or 0 in query.shape[1:]:
        raise ValueError(
            f"query must be (B, h, N, d) with at least one head, token and channel, "
            f"got shape {tuple(query.shape)}"
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"query must be {_DTYPE_NAMES}, got dtype {query.dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() not in (3, 4) or tensor.shape != query.shape[4 - tensor.dim() :]:
            raise ValueError(
                f"{name} must be (h, N, d) = {tuple(query.shape[1:])} or (B, h, N, d) = "
                f"{tuple(query.shape)} as the query, got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} must have the query's dtype {query.dtype}, got dtype {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on the query's device {query.device}, got device {tensor.device}"
            )


def _check_grid(grid: Sequence[int], tokens: int) -> tuple[int, int]:
    if not isinstance(grid, Sequence) or not _are_integers(grid) or min(grid) < 1:
        raise ValueError(f"grid must be two positive integers (H, W), got {grid=}")
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid must have H·W = N = {tokens} tokens, got {grid=}")
    return grid[0], grid[1]


def _are_integers(pair: Sequence[int]) -> bool:
    return len(pair) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in pair)
