"""y + s x A' B', the product that low-rank techniques spend their time in."""

import torch
from torch._C import _are_functorch_transforms_active
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook


def call(base, x):
    """Return base(x), which `add_low_rank` may overwrite, and the x that goes with it.

    Both are rows, (N, in) and (N, out): a linear layer returns views of more axes, and autograd
    copies a view before it is changed in place. Where a hook looks on, x keeps its shape, and the
    hook what it saw.

    Parameters
    ----------
    base : nn.Module
        A linear layer.
    x : Tensor of shape (..., in)
    """
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks)
    if any(hooks) or base._backward_pre_hooks or _has_any_global_hook():
        return base(x).clone(), x
    rows = x.reshape(-1, x.shape[-1])
    return base(rows), rows


def add_low_rank(y, x, A, B, scaling):
    """Return y + scaling * x A' B' in the dtype of y.

    In the fast form where nothing needs the plain one: autocast, mixed dtypes, `torch.func`'s
    transforms, tracing and compiling do.

    Parameters
    ----------
    y : Tensor of shape (..., out)
        Overwritten.
    x : Tensor of shape (..., in)
    A : Tensor of shape (r, in)
    B : Tensor of shape (out, r)
    scaling : float

    Returns
    -------
    Tensor of shape (..., out)
    """
    mixed = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if mixed or traced or not y.dtype == x.dtype == A.dtype or _are_functorch_transforms_active():
        return (y + scaling * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)
    return AddLowRank.apply(y, x, A, B, scaling)


class AddLowRank(torch.autograd.Function):
    """y += scaling * x A' B' in place, the thin product A x' kept as (r, N).

    Plain autograd makes two more tensors as large as y and multiplies thin matrices in the layout
    that the BLAS is slow at. The gradients are written in operations that can be differentiated
    again.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, scaling):
        h = A @ x.reshape(-1, x.shape[-1]).T  # (r, N)
        y.view(-1, y.shape[-1]).addmm_(h.T, B.T, alpha=scaling)  # (N, out)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, A, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, g):
        x, h, A, B = ctx.saved_tensors
        inputs = x.reshape(-1, x.shape[-1])  # (N, in)
        rows = g.reshape(-1, g.shape[-1])  # (N, out)
        if torch.is_grad_enabled():  # for a second derivative, which h as it was kept cannot give
            h = A @ inputs.T
        of_h = ctx.scaling * (B.T @ rows.T)  # (r, N)
        _, for_x, for_A, for_B, _ = ctx.needs_input_grad
        of_x = (of_h.T @ A).view_as(x) if for_x else None
        of_A = of_h @ inputs if for_A else None
        of_B = ctx.scaling * (h @ rows).T if for_B else None
        return g, of_x, of_A, of_B, None
