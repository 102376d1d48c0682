"""What all techniques share: a layer that owns its frozen `base`; how a linear layer is read."""

import torch
from torch import nn
from torch.nn import functional as F

from helpers.peft.four_bits import QuantizedLinear
from helpers.training import freeze


class Adapter(nn.Module):
    """y = base(x) while disabled, what the technique makes of it while enabled.

    Each technique is a subclass: `adapted` is its equation, and `changed`, where a plain layer can
    compute the same, returns what of the base's parameters that layer has otherwise.

    It takes the base's place unseen: attributes are the base's, ``weight`` and ``bias`` those that
    the technique makes of them (with gradients, so that a model may compute with them itself), and
    `state_dict` has the base's tensors under the names that they had. New parameters are on the
    base's device, in its dtype, but float32 on a base in half precision, where the steps of an
    optimiser would be rounded away; outputs have the base's dtype.

    Parameters
    ----------
    base : nn.Module
        The layer to adapt. It is frozen.
    **settings : object
        What a checkpoint must agree on, such as the rank; the printed model shows them.
    """

    changed = None  # a nonlinear addition cannot be folded into a weight

    def __init__(self, base, **settings):
        super().__init__()
        inner = [m for m in base.modules() if isinstance(m, Adapter)]
        trained = {p for m in inner for n, p in m.named_parameters() if not n.startswith("base.")}
        freeze(*(p for p in base.parameters() if p not in trained))
        self.base = base
        self.settings = settings
        self.enabled = True
        self.training = base.training
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_pre_hook(_with_base)

    def forward(self, *args, **kwargs):
        run = self.adapted if self.enabled else self.base
        return run(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
        names = {"weight", "bias", *self.base._parameters}
        if name in names and self.enabled and self.changed is not None:
            try:
                changed = self.changed()
            except RuntimeError as error:
                raise ValueError("a layer was resized under its adapter: unload first") from error
            if name in changed:
                return changed[name]
        return getattr(self.base, name)

    def __setattr__(self, name, value):
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and name in ("weight", "bias"):
            before = getattr(base, name, None)
            if None not in (before, value) and before.shape != value.shape:
                new, old = tuple(value.shape), tuple(before.shape)
                raise ValueError(
                    f"a {name} of shape {new} under an adapter for {old}: unload first"
                )
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def merged(self):
        """Return the plain layer that computes the same; its parameters are frozen."""
        return with_parameters(self.base, self.changed())

    def removed(self):
        """Return the base as it was before."""
        return self.base

    def extra_repr(self):
        """Return the settings, as ``r=8, lora_alpha=16``."""
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


def _without_base(adapter, state, prefix, metadata):
    """Rename "base.weight" to "weight" in a state dict: a plain model finds its own tensors."""
    for key in [key for key in state if key.startswith(f"{prefix}base.")]:
        state[prefix + key.removeprefix(f"{prefix}base.")] = state.pop(key)


def _with_base(adapter, state, prefix, *args):
    """Undo `_without_base`, for all that is not the adapter's own."""
    own = {*adapter._parameters, *adapter._buffers, *adapter._modules}
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.partition(".")[0] not in own:
            state[f"{prefix}base.{name}"] = state.pop(key)


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
    kind = type(base).__name__
    if isinstance(base, QuantizedLinear):
        return sizes(base)
    if not (isinstance(base, nn.Linear) or is_conv1d(base)):
        raise ValueError(f"a {kind} is neither torch's Linear nor transformers' Conv1D")
    if "weight" not in base._parameters:
        raise ValueError(
            f"this {kind} computes its weight from others: end that (pruning, weight"
            " norm or another parametrisation) first"
        )
    if isinstance(base, nn.Linear) and not _computes_linear(base):
        raise ValueError(f"a {kind} is a Linear that does not compute W x + b, or not that alone")
    return sizes(base)


def _computes_linear(base):
    """Whether a Linear, or a subclass of it, is W x + b; tried out where its code is another."""
    if type(base).forward is nn.Linear.forward or base.weight.is_meta:
        return True
    if {*base.state_dict()} > {"weight", "bias"}:
        return False
    x = torch.linspace(-1, 1, 2 * base.in_features).sin().view(2, -1).to(base.weight)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            y = type(base).forward(base, x)
            return torch.allclose(y, F.linear(x, base.weight, base.bias), rtol=1e-2, atol=1e-3)
        except Exception:  # it reads its weight in another way
            return False


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
        told = "has no linear layer that tells its widths (a prompt can ask embedding_dim instead)"
        raise ValueError(f"{type(base).__name__} {told}")
    first, last = (matrix(layer).shape for layer in (layers[0], layers[-1]))
    return first[1], last[0]


def matrix(base):
    """Return W of a linear layer, of shape (out, in) whatever way the layer stores it.

    Parameters
    ----------
    base : nn.Linear, transformers' Conv1D or QuantizedLinear
    """
    return base.weight.T if is_conv1d(base) else base.weight


def stored(base, W):
    """Return W of shape (out, in) the way that a linear layer stores its weight.

    Parameters
    ----------
    base : nn.Linear, transformers' Conv1D or QuantizedLinear
    W : Tensor of shape (out, in)
    """
    return (W.T if is_conv1d(base) else W).to(base.weight.dtype)


def with_parameters(base, changed):
    """Put other values, frozen, in the place of a layer's parameters, which keep their order.

    Parameters
    ----------
    base : nn.Module
        Changed in place; a `QuantizedLinear` whose weight changes is left for a `torch.nn.Linear`.
    changed : dict of str to Tensor
        New values by name.

    Returns
    -------
    nn.Module
    """
    if isinstance(base, QuantizedLinear) and "weight" in changed:
        plain = nn.Linear(*sizes(base), bias=False, device="meta")  # draws nothing
        del plain.bias  # a parameter, or under `Tuned` a buffer
        is_parameter = "bias" in base._parameters
        (plain.register_parameter if is_parameter else plain.register_buffer)("bias", base.bias)
        base = plain.train(base.training)
    for name, value in changed.items():
        base._buffers.pop(name, None)
        value = value.detach().clone(memory_format=torch.contiguous_format)
        base._parameters[name] = nn.Parameter(value, requires_grad=False)
    return base


def _like(base):
    """Return an empty tensor with the device of a module and the dtype for new parameters."""
    t = next(t for t in (*base.parameters(), *base.buffers()) if t.is_floating_point())
    return torch.empty(0, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)


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
