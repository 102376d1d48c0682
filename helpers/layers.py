"""The mathematics of each technique: a layer that owns its frozen `base` and adds to it.

In the equations x is a column, W of shape (out, in) the base's weight and b its bias; in the code a
row of x is an example. New parameters have the base's dtype and device.
"""

import inspect
import math
from numbers import Integral, Real

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from helpers.freezing import freeze
from helpers.quantize import QuantizedLinear, check_rank, low_rank


class Adapter(nn.Module):
    """y = base(x) while disabled, what the technique makes of it while enabled.

    Each technique below is a subclass: `adapted` is its equation, and `merged`, where there can be
    one, returns the plain layer that computes the same.

    Parameters
    ----------
    base : nn.Module
        The layer to adapt. It is frozen.
    **settings : object
        What a checkpoint must agree on, such as the rank; the printed model shows them.
    """

    merged = None  # a nonlinear addition cannot be folded into a weight

    def __init__(self, base, **settings):
        super().__init__()
        inner = [m for m in base.modules() if isinstance(m, Adapter)]
        trained = {p for m in inner for n, p in m.named_parameters() if not n.startswith("base.")}
        freeze(*(p for p in base.parameters() if p not in trained))
        self.base = base
        self.settings = settings
        self.enabled = True
        self.training = base.training

    def forward(self, *args, **kwargs):
        run = self.adapted if self.enabled else self.base
        return run(*args, **kwargs)

    @property
    def weight(self):
        """Return the base's weight, for models that look at its dtype before they call the layer.

        Computing with it would bypass the adapter.
        """
        return self.base.weight

    def extra_repr(self):
        """Return the settings, as ``r=8, lora_alpha=16``."""
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


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
        Rank, from 1 to the smaller side of W.
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
        check_rank(r, (d_out, d_in))
        if not isinstance(lora_alpha, Real) or not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha={lora_alpha!r} must be above 0, and a finite number")
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
        rows = x.reshape(-1, x.shape[-1])  # (N, in): a base returns views of more axes, and
        y = self.base(rows)  # autograd copies a view before it is changed in place
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

    def merged(self):
        """Return the base with the merged weight."""
        return with_matrix(self.base, self.merged_weight())


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
        return norms.clamp(min=torch.finfo(norms.dtype).tiny)  # a row of zeros stays one

    def adapted(self, x):
        y = super().adapted(x)  # (W + s B A) x + b
        grow = self.magnitude / self.row_norms() - 1  # (out,), exactly 0 at the start
        bias = self.base.bias
        return y + grow * (y if bias is None else y - bias)

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
        self.projection = projection
        self.lambda_d = nn.Parameter(_like(base).new_full((r,), d_initial))  # u
        self.lambda_b = nn.Parameter(_like(base).new_zeros(d_out))  # v

    def low_rank(self):
        """Return u * A of shape (r, in) and v * B of shape (out, r)."""
        d_in, d_out = sizes(self.base)
        A, B = self.projection.A[:, :d_in], self.projection.B[:d_out]
        return self.lambda_d[:, None] * A, self.lambda_b[:, None] * B

    def adapted(self, x):
        rows = x.reshape(-1, x.shape[-1])  # (N, in), as in LoRA
        y = add_low_rank(self.base(rows), rows, *self.low_rank(), 1.0)
        return y.view(*x.shape[:-1], y.shape[-1])

    def delta_weight(self):
        """Return (v * B)(u * A) of shape (out, in)."""
        A, B = self.low_rank()
        return B @ A

    def merged(self):
        """Return the base with weight W + (v * B)(u * A)."""
        return with_matrix(self.base, matrix(self.base) + self.delta_weight())


class IA3(Adapter):
    """y = l * (W x + b), or y = W (l * x) + b before a feed-forward layer; l starts at one.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
    feedforward : bool, default=False
        Rescale the layer's inputs, the hidden units of a feed-forward block, not its outputs.

    References
    ----------
    Liu et al. (2022), section 3.3, arXiv:2205.05638.
    """

    def __init__(self, base, *, feedforward=False):
        check_linear(base)
        super().__init__(base, feedforward=feedforward)
        self.ia3_l = nn.Parameter(_like(base).new_ones(sizes(base)[0 if feedforward else 1]))

    def adapted(self, x):
        if self.settings["feedforward"]:
            return self.base(self.ia3_l * x)
        return self.ia3_l * self.base(x)

    def merged(self):
        """Return the base with its rows (and bias), or its columns, rescaled."""
        if self.settings["feedforward"]:
            return with_matrix(self.base, matrix(self.base) * self.ia3_l)
        if self.base.bias is not None:
            self.base.bias = nn.Parameter(self.base.bias * self.ia3_l, requires_grad=False)
        return with_matrix(self.base, matrix(self.base) * self.ia3_l[:, None])


class OFT(Adapter):
    """y = W R x + b, with R block-diagonal and orthogonal: R = (I + Q)(I - Q)^-1, Q = -Q'.

    The Cayley transform of each skew-symmetric block Q is a rotation; Q starts at zero, R at the
    identity. Rotating inputs leaves the norm of each row of W as it is.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
    block_size : int
        Side of a block, a divisor of `in_features` and at least 2.

    References
    ----------
    Qiu et al. (2023), section 3.2, arXiv:2306.07280.
    """

    def __init__(self, base, block_size):
        d_in, _ = check_linear(base)
        if not isinstance(block_size, Integral) or block_size < 2 or d_in % block_size:
            fit = [b for b in range(2, d_in + 1) if d_in % b == 0]
            raise ValueError(
                f"block_size={block_size} must divide in_features={d_in}: one of {fit}"
            )
        block_size = int(block_size)
        super().__init__(base, block_size=block_size)
        n = block_size * (block_size - 1) // 2
        self.oft_R = nn.Parameter(_like(base).new_zeros(d_in // block_size, n))

    def rotations(self):
        """Return the blocks of R, shape (in / block_size, block_size, block_size)."""
        b = self.settings["block_size"]
        rows, columns = torch.triu_indices(b, b, 1, device=self.oft_R.device)
        angles = wide(self.oft_R)
        Q = angles.new_zeros(len(angles), b, b)
        Q[:, rows, columns] = angles
        Q = Q - Q.mT
        eye = torch.eye(b, dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(eye - Q, eye + Q).to(self.oft_R.dtype)  # the two factors commute

    def adapted(self, x):
        blocks = x.unflatten(-1, (-1, self.settings["block_size"]))  # (..., n, b)
        return self.base(torch.einsum("nij,...nj->...ni", self.rotations(), blocks).flatten(-2))

    def merged(self):
        """Return the base with weight W R."""
        R = torch.block_diag(*self.rotations())
        return with_matrix(self.base, matrix(self.base) @ R)


class Tuned(Adapter):
    """y = base(x), computed with a trained version of some of the base's own parameters.

    BitFit trains ``bias``, LayerNorm tuning ``weight`` and ``bias``. The originals stay with the
    base as buffers, so that disabling restores them and the count of parameters does not change.

    Parameters
    ----------
    base : nn.Module
    names : sequence of str
        Of the parameters to train, in the order in which the base holds them.

    References
    ----------
    Ben Zaken et al. (2021), section 3 (BitFit), arXiv:2106.10199; Zhao et al. (2023), section 3
    (LayerNorm tuning), arXiv:2312.11420.
    """

    def __init__(self, base, names):
        super().__init__(base, names=list(names))
        for name in names:
            original = getattr(base, name).detach()
            self.register_parameter(f"tuned_{name}", nn.Parameter(original.clone()))
            delattr(base, name)
            base.register_buffer(name, original)

    def tuned(self):
        """Return the trained parameters, by the names of their originals."""
        return {name: getattr(self, f"tuned_{name}") for name in self.settings["names"]}

    def adapted(self, *args, **kwargs):
        return torch.func.functional_call(self.base, self.tuned(), args, kwargs)

    def merged(self):
        """Return the base with the trained parameters in the place of the originals."""
        for name, p in self.tuned().items():
            delattr(self.base, name)
            trained = nn.Parameter(p.detach().clone(), requires_grad=False)
            self.base.register_parameter(name, trained)
        return self.base


class BottleneckAdapter(Adapter):
    """y = f(x) + U relu(D f(x)), or in parallel y = f(x) + s U relu(D x), f being the base.

    D maps to d / reduction_factor units and U back, both with a bias. U starts at zero, so the
    model starts as it was.

    Parameters
    ----------
    base : nn.Module
        Maps a tensor to a tensor: a linear layer, or a sub-layer whose first and last linear layers
        tell the widths, such as an attention or a feed-forward module.
    reduction_factor : float
        Width of f(x), in parallel of x, over that of the bottleneck.
    parallel : bool, default=False
    scale : float, default=1.0
        The factor s of the parallel form.
    generator : torch.Generator, optional
        Of D; None is torch's global stream.

    References
    ----------
    Houlsby et al. (2019), section 2, arXiv:1902.00751; Pfeiffer et al. (2020), arXiv:2005.00247;
    He et al. (2021), section 3.3 (parallel), arXiv:2110.04366.
    """

    def __init__(self, base, reduction_factor, *, parallel=False, scale=1.0, generator=None):
        d_in, d_out = sizes(base)
        d_in = d_in if parallel else d_out
        width = int(d_in / reduction_factor) if reduction_factor > 0 else 0
        if width < 1:
            raise ValueError(f"reduction_factor={reduction_factor} must be above 0, at most {d_in}")
        settings = dict(reduction_factor=reduction_factor, parallel=parallel, scale=scale)
        super().__init__(base, **settings)
        like = _like(base)
        D = uniform((width, d_in), 1 / math.sqrt(d_in), like=like, generator=generator)
        self.down_weight = nn.Parameter(D)
        self.down_bias = nn.Parameter(like.new_zeros(width))
        self.up_weight = nn.Parameter(like.new_zeros(d_out, width))
        self.up_bias = nn.Parameter(like.new_zeros(d_out))

    def adapted(self, x, *args, **kwargs):
        y = self.base(x, *args, **kwargs)
        if not isinstance(y, torch.Tensor):
            kind = type(self.base).__name__
            raise TypeError(
                f"{kind} returns a {type(y).__name__}, not a tensor: adapt a layer in it"
            )
        h = F.relu(
            F.linear(x if self.settings["parallel"] else y, self.down_weight, self.down_bias)
        )
        scale = self.settings["scale"] if self.settings["parallel"] else 1.0
        return y + scale * F.linear(h, self.up_weight, self.up_bias)


class PromptTuning(Adapter):
    """Put trained vectors before a sequence: (B, T, d) becomes (B, P + T, d).

    Parameters
    ----------
    base : nn.Module
        Embeds a sequence: a `torch.nn.Embedding`, or a module whose last linear layer has d
        outputs. The model above it must accept P more tokens, and read its result off the others.
        A model of transformers goes by the length of its ``input_ids``: call the adapted embedding
        yourself and hand the model ``inputs_embeds``.
    num_virtual_tokens : int
        P.
    std : float, default=0.02
        Of the normal distribution that the vectors are drawn from.
    generator : torch.Generator, optional
        None is torch's global stream.

    References
    ----------
    Lester et al. (2021), section 2, arXiv:2104.08691.
    """

    def __init__(self, base, num_virtual_tokens, *, std=0.02, generator=None):
        check_tokens(num_virtual_tokens)
        d = base.embedding_dim if isinstance(base, nn.Embedding) else sizes(base)[1]
        super().__init__(base, num_virtual_tokens=num_virtual_tokens)
        like = _like(base)
        self.prompt = nn.Parameter(normal((num_virtual_tokens, d), std, like, generator))

    def adapted(self, *args, **kwargs):
        tokens = self.base(*args, **kwargs)  # (B, T, d)
        return torch.cat([self.prompt.expand(len(tokens), -1, -1), tokens], 1)


class PrefixTuning(Adapter):
    """softmax(Q [P_k; K]' / sqrt(d_head)) [P_v; V], trained keys and values before the others.

    The keys and values are trained as they are; Li & Liang reach them through a feed-forward
    network during training, which is left out here.

    Parameters
    ----------
    base : nn.Module
        An attention module with attributes `n_heads` and `d_head` whose ``forward(x, prefix)``
        takes P_k and P_v, each of shape (B, n_heads, P, d_head).
    num_virtual_tokens : int
        P.
    std : float, default=0.02
        Of the normal distribution that they are drawn from.
    generator : torch.Generator, optional
        None is torch's global stream.

    References
    ----------
    Li & Liang (2021), section 4, arXiv:2101.00190.
    """

    def __init__(self, base, num_virtual_tokens, *, std=0.02, generator=None):
        check_tokens(num_virtual_tokens)
        offered = {"prefix"} & set(inspect.signature(base.forward).parameters)
        if not offered or not all(hasattr(base, name) for name in ("n_heads", "d_head")):
            raise ValueError(
                f"{type(base).__name__} does not offer what prefix tuning needs: n_heads, d_head,"
                " and forward(x, prefix) with keys and values of shape (B, n_heads, P, d_head)"
            )
        super().__init__(base, num_virtual_tokens=num_virtual_tokens)
        shape = (2, base.n_heads, num_virtual_tokens, base.d_head)
        self.prefix = nn.Parameter(normal(shape, std, _like(base), generator))

    def adapted(self, x, *args, **kwargs):
        k, v = self.prefix[:, None].expand(-1, len(x), -1, -1, -1)  # each (B, H, P, d_head)
        return self.base(x, *args, prefix=(k, v), **kwargs)


def add_low_rank(y, x, A, B, scaling):
    """Return y + scaling * x A' B', in the fast form where autocast does not need the plain one.

    Parameters
    ----------
    y : Tensor of shape (..., out)
        Overwritten: a forward hook that keeps the base's output sees it changed.
    x : Tensor of shape (..., in)
    A : Tensor of shape (r, in)
    B : Tensor of shape (out, r)
    scaling : float

    Returns
    -------
    Tensor of shape (..., out)
    """
    mixed = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if mixed or not y.dtype == x.dtype == A.dtype:
        return y + scaling * F.linear(F.linear(x, A), B)
    return AddLowRank.apply(y, x, A, B, scaling)


class AddLowRank(torch.autograd.Function):
    """y += scaling * x A' B' in place, the thin product A x' kept as (r, N).

    Plain autograd makes two more tensors as large as y and multiplies thin matrices in the layout
    that the BLAS is slow at. Differentiating twice, or by torch.func, is not supported.
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
    @once_differentiable
    def backward(ctx, g):
        x, h, A, B = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])  # (N, out)
        of_h = ctx.scaling * (B.T @ rows.T)  # (r, N)
        _, for_x, for_A, for_B, _ = ctx.needs_input_grad
        of_x = (of_h.T @ A).view_as(x) if for_x else None
        of_A = of_h @ x.reshape(-1, x.shape[-1]) if for_A else None
        of_B = ctx.scaling * (h @ rows).T if for_B else None
        return g, of_x, of_A, of_B, None


def is_conv1d(base):
    """Whether a layer is GPT-2's linear layer from transformers, whose weight is (in, out).

    Parameters
    ----------
    base : nn.Module
    """
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


def check_linear(base):
    """Refuse a layer that is not linear.

    Parameters
    ----------
    base : nn.Module

    Returns
    -------
    in_features, out_features : int
    """
    if isinstance(base, QuantizedLinear):
        return sizes(base)
    kind = type(base).__name__
    plain = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    if not (plain or is_conv1d(base)):
        raise ValueError(f"a {kind} is neither torch's Linear nor transformers' Conv1D")
    if "weight" not in base._parameters:
        raise ValueError(
            f"this {kind} computes its weight from others: end that (pruning, weight"
            " norm or another parametrisation) first"
        )
    return sizes(base)


def wide(x):
    """Return half-precision numbers in single precision, for decompositions that need it.

    Parameters
    ----------
    x : Tensor
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def check_tokens(num_virtual_tokens):
    """Refuse a number of virtual tokens below one.

    Parameters
    ----------
    num_virtual_tokens : int
    """
    if not isinstance(num_virtual_tokens, Integral) or num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens={num_virtual_tokens} must be an integer, 1 or more")


def sizes(base):
    """Return the inputs of the first linear layer in `base` and the outputs of the last one.

    Parameters
    ----------
    base : nn.Module
        A linear layer is both.

    Returns
    -------
    in_features, out_features : int
    """
    kinds = nn.Linear | QuantizedLinear
    layers = [m for m in base.modules() if isinstance(m, kinds) or is_conv1d(m)]
    if not layers:
        raise ValueError(f"{type(base).__name__} has no linear layer that tells its widths")
    first, last = (matrix(layer).shape for layer in (layers[0], layers[-1]))
    return first[1], last[0]


def matrix(base):
    """Return W of a linear layer, of shape (out, in) whatever way the layer stores it.

    Parameters
    ----------
    base : nn.Linear, transformers' Conv1D or QuantizedLinear
    """
    return base.weight.T if is_conv1d(base) else base.weight


def with_matrix(base, W):
    """Return the linear layer `base` with W of shape (out, in) in the place of its weight.

    Parameters
    ----------
    base : nn.Linear, transformers' Conv1D or QuantizedLinear
        The last one is left for a new `torch.nn.Linear` with its bias.
    W : Tensor of shape (out, in)
    """
    if isinstance(base, QuantizedLinear):
        plain = nn.Linear(*sizes(base), bias=False, device="meta")  # draws nothing
        del plain.bias  # a parameter, or under `Tuned` a buffer
        is_parameter = "bias" in base._parameters
        (plain.register_parameter if is_parameter else plain.register_buffer)("bias", base.bias)
        base = plain.train(base.training)
    W = (W.T if is_conv1d(base) else W).detach().contiguous()
    base.weight = nn.Parameter(W, requires_grad=False)
    return base


def _like(base):
    """Return a floating tensor of a module, which tells its dtype and device."""
    return next(t for t in (*base.parameters(), *base.buffers()) if t.is_floating_point())


def uniform(shape, bound, *, like, generator):
    """Draw from -bound to bound, on the CPU, so that a device does not change the numbers.

    Parameters
    ----------
    shape : tuple of int
    bound : float
    like : Tensor
        Gives dtype and device.
    generator : torch.Generator or None
    """
    return _drawn(shape, like, lambda x: x.uniform_(-bound, bound, generator=generator))


def normal(shape, std, like, generator):
    """Draw from a normal distribution around 0, as `uniform` does.

    Parameters
    ----------
    shape : tuple of int
    std : float
    like : Tensor
    generator : torch.Generator or None
    """
    return _drawn(shape, like, lambda x: x.normal_(0, std, generator=generator))


def _drawn(shape, like, fill):
    if like.is_meta:
        return like.new_empty(shape)
    return fill(torch.empty(shape, dtype=like.dtype)).to(like.device)
