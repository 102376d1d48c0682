"""What all techniques share: a layer that owns its frozen `base`; how a linear layer is read."""

import torch
from torch import nn

from helpers.peft.four_bits import QuantizedLinear
from helpers.training import freeze


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
