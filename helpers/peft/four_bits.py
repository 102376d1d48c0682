"""A frozen base in four bits (QLoRA), and an adapter that starts from what rounding lost (LoftQ).

A weight is cut into blocks. A block keeps the largest absolute value in it, its scale, and for each
weight the nearest of sixteen levels in [-1, 1]: W~ = scale * level.
"""

from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtri
from torch import nn
from torch.nn import functional as F

SCALE_BLOCK = 256  # scales that share one float32

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0


def normal_float():
    """Return NF4's levels: quantiles of N(0, 1), with an exact 0, over the largest of them.

    Their probabilities are evenly spaced from t to 1/2 (8 levels, the last one 0) and from 1/2 to
    1 - t (8 more), with t = (1/32 + 1/30) / 2 because the quantiles at 0 and 1 are infinite. The
    published table was computed in float32 and is up to 2e-7 from this.

    Returns
    -------
    float64 Tensor of shape (16,)
        In ascending order.

    References
    ----------
    Dettmers et al. (2023), section 3 and appendix E, arXiv:2305.14314.
    """
    top = 1 - (1 / 32 + 1 / 30) / 2
    negative, positive = -ndtri(np.linspace(top, 0.5, 8)[:-1]), ndtri(np.linspace(0.5, top, 9))
    return torch.from_numpy(np.concatenate([negative, positive]) / positive[-1])


# Uniform levels for comparison. As the scale is the largest absolute value, a block reaches both
# -1 and 1 but never below: the lowest of the sixteen, -8/7, is there for its code and not used.
CODEBOOKS = {"nf4": normal_float(), "int4": torch.arange(-8, 8, dtype=torch.float64) / 7}


class Quantized(NamedTuple):
    """A tensor of n numbers in 4 + 8 / block_size + 32 / (256 block_size) bits each, 32 bits more.

    A scale is ``mean + step * scales``, with one step for 256 scales (double quantisation).

    Attributes
    ----------
    codes : uint8 Tensor of shape (n / 2,)
        Two levels in a byte, the first one in the high half; n is padded to whole blocks.
    scales : float8_e4m3fn Tensor of shape (n / block_size,)
    steps : float32 Tensor of shape (n / block_size / 256, rounded up,)
    mean : float32 Tensor of shape (1,)
    shape : torch.Size
    dtype : torch.dtype
        Of what was quantised.
    code : {"nf4", "int4"}
    block_size : int
    """

    codes: torch.Tensor
    scales: torch.Tensor
    steps: torch.Tensor
    mean: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    code: str
    block_size: int


@torch.no_grad()
def quantize(W, *, code="nf4", block_size=64):
    """Round each number to the nearest level of its block, and the blocks' scales to 8 bits.

    Blocks follow one another along the last axis, as the numbers lie in memory; the last one is
    padded with zeros. The levels are chosen with the exact scales.

    Parameters
    ----------
    W : floating Tensor of any shape
    code : {"nf4", "int4"}
    block_size : int, default=64
        Numbers that share a scale, even.

    Returns
    -------
    Quantized

    Raises
    ------
    ValueError
        If `W` is empty, or has a value that is not finite in float32.

    References
    ----------
    Dettmers et al. (2023), section 3, arXiv:2305.14314.
    """
    if code not in CODEBOOKS:
        raise ValueError(f'code={code!r} must be "nf4" or "int4"')
    if not isinstance(block_size, Integral) or block_size < 2 or block_size % 2:
        raise ValueError(
            f"block_size={block_size!r} must be an even integer, 2 or more: a byte has two codes"
        )
    if not W.is_floating_point() or not W.numel():
        raise ValueError(f"a {W.dtype} tensor of shape {tuple(W.shape)} has no weights to quantise")
    largest = torch.finfo(torch.float32).max
    if not W.is_meta and not W.abs().amax() <= largest:  # NaN is not either
        raise ValueError("a weight is NaN, infinite or beyond float32: quantise a sound model")
    block_size = int(block_size)
    x = W.to(torch.promote_types(W.dtype, torch.float32)).flatten()
    x = F.pad(x, (0, -len(x) % block_size)).view(-1, block_size)  # (blocks, block_size)
    absmax = x.abs().amax(1)
    x = x / torch.where(absmax > 0, absmax, 1)[:, None]
    levels = CODEBOOKS[code].to(x)
    nearest = torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)  # of two equally near, the lower
    high, low = nearest.view(-1, 2).unbind(1)
    mean = absmax.mean(0, keepdim=True).float()
    rest = F.pad(absmax - mean, (0, -len(absmax) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    steps = (rest.abs().amax(1) / FP8_MAX).float().clamp(min=torch.finfo(torch.float32).tiny)
    scales = (rest / steps[:, None]).flatten()[: len(absmax)].to(FP8)
    codes = (16 * high + low).to(torch.uint8)
    return Quantized(codes, scales, steps, mean, W.shape, W.dtype, code, block_size)


@torch.no_grad()
def dequantize(q, dtype=None):
    """Return the tensor that the codes and scales stand for, in its own shape.

    A scale that 8 bits would make negative is 0.

    Parameters
    ----------
    q : Quantized
    dtype : torch.dtype, optional
        None is that of what was quantised.

    Returns
    -------
    Tensor of shape q.shape
    """
    dtype = dtype or q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    steps = q.steps.to(wide).repeat_interleave(SCALE_BLOCK)[: len(q.scales)]
    scales = (q.mean + steps * q.scales.to(wide)).clamp(min=0)  # (blocks,)
    levels = CODEBOOKS[q.code].to(q.codes.device, wide)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2), what each byte stands for
    x = pairs[q.codes.int()].view(-1, q.block_size) * scales[:, None]
    return x.flatten()[: q.shape.numel()].view(q.shape).to(dtype)


class QuantizedLinear(nn.Module):
    """y = W~ x + b, with W~ restored from four bits for each product and kept for none.

    Buffers hold the codes and scales, so it has no weight to train; a bias stays the parameter that
    it was. Casting the module changes the dtype that it computes in and not what it stores.

    Parameters
    ----------
    quantized : Quantized
        W~ of shape (out, in).
    bias : nn.Parameter of shape (out,), optional

    References
    ----------
    Dettmers et al. (2023), section 3, equation 5, arXiv:2305.14314.
    """

    def __init__(self, quantized, bias=None):
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.code, self.block_size = quantized.code, quantized.block_size
        for name, t in self._stored(quantized).items():
            self.register_buffer(name, t.view(torch.uint8))  # bytes, which no cast touches
        empty = torch.empty(0, dtype=quantized.dtype, device=quantized.codes.device)
        self.register_buffer("like", empty, persistent=False)  # has the dtype, which casts change
        self.register_parameter("bias", bias)

    def _stored(self, q):
        # named by their code: load_state_dict then refuses the codes of another code book
        return {f"{q.code}_codes": q.codes, "scales": q.scales, "steps": q.steps, "mean": q.mean}

    @property
    def quantized(self):
        """Return the codes and scales, views of the buffers."""
        codes = getattr(self, f"{self.code}_codes")
        scales, steps = self.scales.view(FP8), self.steps.view(torch.float32)
        mean, shape = (
            self.mean.view(torch.float32),
            torch.Size((self.out_features, self.in_features)),
        )
        return Quantized(
            codes, scales, steps, mean, shape, self.like.dtype, self.code, self.block_size
        )

    @property
    def weight(self):
        """Return W~ of shape (out, in), restored anew."""
        return dequantize(self.quantized)

    @property
    def n_quantized(self):
        """Return how many weights the codes hold, which `count_parameters` reads."""
        return self.in_features * self.out_features

    def forward(self, x):
        y = QuantizedProduct.apply(x, self.quantized)
        return y if self.bias is None else y + self.bias

    def extra_repr(self):
        """Return the sizes and the code."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.code}, block_size={self.block_size}"


class QuantizedProduct(torch.autograd.Function):
    """x W~', restoring W~ again for the gradient of x: plain autograd would keep it until then."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.save_for_backward(q.codes, q.scales, q.steps, q.mean)
        ctx.rest = q[4:]
        return F.linear(x, dequantize(q))

    @staticmethod
    def backward(ctx, g):
        return g @ dequantize(Quantized(*ctx.saved_tensors, *ctx.rest), g.dtype), None


def check_rank(r, shape):
    """Refuse a rank that a matrix cannot have.

    Parameters
    ----------
    r : int
    shape : pair of int
    """
    if not isinstance(r, Integral) or not 1 <= r <= min(shape):
        side = min(shape)
        raise ValueError(f"rank r={r} must be an integer from 1 to {side}, the smaller side")


def low_rank(M, r, scaling=1.0):
    """Return A and B of which scaling B A is the matrix of rank `r` that is nearest to `M`.

    The singular values go to both in equal parts, so that neither starts out larger.

    Parameters
    ----------
    M : Tensor of shape (out, in)
    r : int
        Rank, from 1 to the smaller side of `M`.
    scaling : float, default=1.0

    Returns
    -------
    A : Tensor of shape (r, in)
    B : Tensor of shape (out, r)
    """
    check_rank(r, M.shape)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return (root[:, None] * Vh[:r]).contiguous(), (U[:, :r] * root).contiguous()


@torch.no_grad()
def loftq(W, r, *, scaling=1.0, code="nf4", block_size=64, steps=5):
    """Find W~ and scaling B A that together are near `W`, in turns (LoftQ, algorithm 1).

    From B A = 0, each step quantises W - scaling B A, then takes the best B A for what W~ lacks.
    The first step cannot end further from `W` than W~ alone. Later ones may: an absmax scale is no
    projection, so they usually gain, but nothing makes them.

    Parameters
    ----------
    W : Tensor of shape (out, in)
    r : int
        Rank, from 1 to the smaller side of `W`.
    scaling : float, default=1.0
        LoRA's s. The paper has none.
    code, block_size
        As in `quantize`.
    steps : int, default=5

    Returns
    -------
    q : Quantized
    A : Tensor of shape (r, in)
    B : Tensor of shape (out, r)

    References
    ----------
    Li et al. (2023), section 3, algorithm 1, arXiv:2310.08659.
    """
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer, 1 or more")
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    delta = torch.zeros_like(wide)
    for _ in range(steps):
        q = quantize(wide - delta, code=code, block_size=block_size)
        A, B = low_rank(wide - dequantize(q), r, scaling)
        delta = scaling * B @ A
    return q._replace(dtype=W.dtype), A.to(W.dtype), B.to(W.dtype)
