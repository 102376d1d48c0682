"""Low-rank updates: LoRA, rsLoRA, PiSSA, DoRA and VeRA.

In the equations x is a column, W of shape (out, in) the base's weight and b its bias; in the code a
row of x is an example.
"""

import math
from numbers import Integral, Real

import torch
from torch import nn
from torch.nn import functional as F

from helpers.peft.base import (
    Adapter,
    _like,
    check_linear,
    matrix,
    sizes,
    stored,
    uniform,
    wide,
)
from helpers.peft.four_bits import low_rank
from helpers.peft.product import add_low_rank, call


class LoRA(Adapter):
    """y = W x + b + s B A x, with s = lora_alpha / r.

    B starts at zero, so the model starts as it was, and A random, so that B has a gradient.

    With ``init="pissa"``, B0 A0 = the r largest singular values and vectors of W over s, and
    y = W x + b + s (B A - B0 A0) x. The paper trains B A on the residual W - s B0 A0, which is the
    same function; here W stays what it was and others may share it. A0 and B0 are buffers.

    On a `QuantizedLinear`, W is what its codes stand for (QLoRA). Merging gives a linear layer in
    full precision: W + s B A, rounded to four bits again, would lose most of so small a change.

    Parameters
    ----------
    base : nn.Linear, transformers' Conv1D or QuantizedLinear
    r : int
        Rank. Above the smaller side of W, which `inject_lora` refuses, it adds nothing.
    lora_alpha : float
    rslora : bool, default=False
        s = lora_alpha / sqrt(r) instead: the update's size then does not shrink with r.
    dropout : float, default=0.0
        Probability with which an input of A is dropped, in train mode.
    init : {"lora", "pissa"}
    generator : torch.Generator, optional
        Of A; None is torch's global stream.

    References
    ----------
    Hu et al. (2021), section 4.1, arXiv:2106.09685; Kalajdzievski (2023), section 3 (rsLoRA),
    arXiv:2312.03732; Meng et al. (2024), section 3 (PiSSA), arXiv:2404.02948; Dettmers et al.
    (2023), section 3 (QLoRA), arXiv:2305.14314.
    """

    def __init__(
        self, base, r, lora_alpha, *, rslora=False, dropout=0.0, init="lora", generator=None
    ):
        d_in, d_out = check_linear(base)
        check_settings(r, lora_alpha)
        if init not in ("lora", "pissa"):
            raise ValueError(f'init={init!r} must be "lora" or "pissa"')
        r, lora_alpha = int(r), float(lora_alpha)
        settings = dict(r=r, lora_alpha=lora_alpha, rslora=rslora, dropout=dropout, init=init)
        super().__init__(base, **settings)
        self.scaling = lora_alpha / (math.sqrt(r) if rslora else r)
        self.dropout = nn.Dropout(dropout).train(base.training)
        like = _like(base)
        if init == "pissa":
            A, B = low_rank(wide(matrix(base)), r, self.scaling)
            A, B = A.to(like.dtype), B.to(like.dtype)
            self.register_buffer("start_A", A.clone())
            self.register_buffer("start_B", B.clone())
        else:
            A = uniform((r, d_in), 1 / math.sqrt(d_in), like=like, generator=generator)
            B = like.new_zeros(d_out, r)
        self.lora_A = nn.Parameter(A)  # (r, in)
        self.lora_B = nn.Parameter(B)  # (out, r)

    def adapted(self, x):
        y, rows = call(self.base, x)
        dropped = self.dropout(x).reshape(rows.shape)
        y = add_low_rank(y, dropped, self.lora_A, self.lora_B, self.scaling)
        if self.settings["init"] == "pissa":
            y = add_low_rank(y, rows, self.start_A, self.start_B, -self.scaling)
        return y.view(*x.shape[:-1], y.shape[-1])

    def delta_weight(self):
        """Return s B A of shape (out, in), for PiSSA s (B A - B0 A0)."""
        delta = self.lora_B @ self.lora_A
        if self.settings["init"] == "pissa":
            delta = delta - self.start_B @ self.start_A
        return self.scaling * delta

    def merged_weight(self):
        """Return W + delta weight of shape (out, in); dropout has no part in it."""
        return matrix(self.base) + self.delta_weight()

    def changed(self):
        """Return the merged weight, by its name."""
        return {"weight": stored(self.base, self.merged_weight())}


class ExpertLoRA(Adapter):
    """W_e + s B_e A_e for each expert e, where one parameter holds the W_e of all experts.

    Parameters
    ----------
    base : nn.Module
    names : sequence of str
        Its parameters to adapt, of shape (experts, n, m): A_e is (r, m) and B_e (n, r), whichever
        side is the input.
    r, lora_alpha, rslora, generator
        As in `LoRA`.

    References
    ----------
    Hu et al. (2021), section 4.1, arXiv:2106.09685.
    """

    def __init__(self, base, names, r, lora_alpha, *, rslora=False, generator=None):
        check_settings(r, lora_alpha)
        settings = dict(r=int(r), lora_alpha=float(lora_alpha), rslora=rslora)
        super().__init__(base, names=list(names), **settings)
        self.scaling = lora_alpha / (math.sqrt(r) if rslora else r)
        like = _like(base)
        for name in names:
            n_experts, n, m = getattr(base, name).shape
            A = uniform((n_experts, r, m), 1 / math.sqrt(m), like=like, generator=generator)
            self.register_parameter(f"{name}_lora_A", nn.Parameter(A))
            B = like.new_zeros(n_experts, n, r)
            self.register_parameter(f"{name}_lora_B", nn.Parameter(B))

    def changed(self):
        """Return W + s B A, by name."""
        out = {}
        for name in self.settings["names"]:
            W, A, B = (
                getattr(self.base, name),
                *(self._parameters[f"{name}_lora_{k}"] for k in "AB"),
            )
            out[name] = (W + self.scaling * (B @ A)).to(W.dtype)
        return out

    def adapted(self, *args, **kwargs):
        return torch.func.functional_call(self.base, self.changed(), args, kwargs)


class DoRA(LoRA):
    """y = m / ||W + s B A|| * (W + s B A) x + b, norms and m taken row by row of W.

    The magnitude m starts at ||W||, so the model starts as it was: only the direction is
    low-rank. The norm counts as a constant in the gradient (section 4.3). Dropout acts on the input
    of A alone; `peft` drops the inputs of W as well.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
    r, lora_alpha, rslora, dropout, generator
        As in `LoRA`.

    References
    ----------
    Liu et al. (2024), section 4, arXiv:2402.09353.
    """

    def __init__(self, base, r, lora_alpha, *, rslora=False, dropout=0.0, generator=None):
        options = dict(rslora=rslora, dropout=dropout, generator=generator)
        super().__init__(base, r, lora_alpha, **options)
        self.magnitude = nn.Parameter(self.row_norms())  # (out,)

    @torch.no_grad()
    def row_norms(self):
        """Return ||W + s B A|| of each row, shape (out,), as a constant."""
        norms = torch.linalg.norm(LoRA.merged_weight(self), dim=1)
        # a row of zeros stays one; detached for forward-mode derivatives, too
        return norms.clamp(min=torch.finfo(norms.dtype).tiny).detach()

    def adapted(self, x):
        y = super().adapted(x)  # (W + s B A) x + b
        grow = self.magnitude / self.row_norms() - 1  # (out,), exactly 0 at the start
        bias = self.base.bias
        return (y + grow * (y if bias is None else y - bias)).to(y.dtype)

    def merged_weight(self):
        """Return m / ||W + s B A|| * (W + s B A) of shape (out, in)."""
        return (self.magnitude / self.row_norms())[:, None] * super().merged_weight()


class Projection(nn.Module):
    """The frozen random A and B that the layers of one `inject_vera` share.

    Parameters
    ----------
    A : Tensor of shape (r, largest in)
    B : Tensor of shape (largest out, r)
    """

    def __init__(self, A, B):
        super().__init__()
        self.held = False  # by the first layer that gets it, as its sub-module
        self.register_buffer("A", A)
        self.register_buffer("B", B)


class VeRA(Adapter):
    """y = W x + b + v * (B (u * (A x))), with A and B random, frozen and shared by the layers.

    u of shape (r,) starts at `d_initial`, v of shape (out,) at zero; only they are trained. A layer
    smaller than the shared matrices uses their first columns and rows.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
    projection : Projection
    d_initial : float, default=0.1

    References
    ----------
    Kopiczko et al. (2023), section 3, arXiv:2310.11454.
    """

    def __init__(self, base, projection, *, d_initial=0.1):
        check_linear(base)
        r, (_, d_out) = len(projection.A), sizes(base)
        super().__init__(base, r=r, d_initial=d_initial)
        if projection.held:  # by another layer of the model, which has it in its state
            self.__dict__["projection"] = projection
        else:
            self.projection, projection.held = projection, True
        self.lambda_d = nn.Parameter(_like(base).new_full((r,), d_initial))  # u
        self.lambda_b = nn.Parameter(_like(base).new_zeros(d_out))  # v

    def matrices(self):
        """Return A of shape (r, in) and B of shape (out, r)."""
        d_in, d_out = sizes(self.base)
        return self.projection.A[:, :d_in], self.projection.B[:d_out]

    def adapted(self, x):
        y, (A, B) = self.base(x), self.matrices()
        h = self.lambda_d * F.linear(x.to(A.dtype), A)  # (..., r)
        return (self.lambda_b * F.linear(h, B)).add_(y).to(y.dtype)

    def delta_weight(self):
        """Return (v * B)(u * A) of shape (out, in)."""
        A, B = self.matrices()
        return self.lambda_b[:, None] * B @ (self.lambda_d[:, None] * A)

    def changed(self):
        """Return W + (v * B)(u * A), by its name."""
        return {"weight": stored(self.base, matrix(self.base) + self.delta_weight())}


def check_settings(r, lora_alpha=1.0):
    """Refuse a rank below one, and a lora_alpha that is not above zero and finite.

    Parameters
    ----------
    r : int
    lora_alpha : float, default=1.0
    """
    if not isinstance(r, Integral) or r < 1:
        raise ValueError(f"rank r={r} must be an integer, 1 or more")
    if not isinstance(lora_alpha, Real) or not 0 < lora_alpha < math.inf:
        raise ValueError(f"lora_alpha={lora_alpha!r} must be above 0, and a finite number")
