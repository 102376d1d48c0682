"""The other techniques: (IA)3, OFT, BitFit and LayerNorm tuning, adapters, prompts and prefixes.

In the equations x is a column, W of shape (out, in) the base's weight and b its bias; in the code a
row of x is an example.
"""

import inspect
import math
from numbers import Integral

import torch
from torch import nn
from torch.nn import functional as F

from helpers.peft.base import (
    Adapter,
    _like,
    check_linear,
    matrix,
    normal,
    sizes,
    stored,
    uniform,
    wide,
    with_parameters,
)


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
            return self.base((self.ia3_l * x).to(x.dtype))
        y = self.base(x)
        return (self.ia3_l * y).to(y.dtype)

    def changed(self):
        """Return the rows of W (and b), or its columns, rescaled."""
        W, b = matrix(self.base), self.base.bias
        if self.settings["feedforward"]:
            return {"weight": stored(self.base, W * self.ia3_l)}
        of_b = {} if b is None else {"bias": (b * self.ia3_l).to(b.dtype)}
        return {"weight": stored(self.base, W * self.ia3_l[:, None])} | of_b


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
        # blocks that are multiplied as one: the BLAS is slow at matrices below 32
        self.at_once = math.gcd(d_in // block_size, max(1, 32 // block_size))

    def rotations(self):
        """Return the blocks of R, shape (in / block_size, block_size, block_size)."""
        b = self.settings["block_size"]
        rows, columns = torch.triu_indices(b, b, 1, device=self.oft_R.device).unbind()
        angles = wide(self.oft_R)
        Q = angles.new_zeros(angles.shape[0], b, b)
        Q[:, rows, columns] = angles
        Q = Q - Q.mT
        eye = torch.eye(b, dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(eye - Q, eye + Q).to(self.oft_R.dtype)  # the two factors commute

    def adapted(self, x):
        R = self.rotations()
        b, k = self.settings["block_size"], self.at_once
        eye = torch.eye(k, dtype=R.dtype, device=R.device).view(k, 1, k, 1)
        R = (R.reshape(-1, k, b, 1, b) * eye).reshape(-1, k * b, k * b)
        blocks = x.unflatten(-1, (-1, k * b)).to(R.dtype)  # (..., n / k, k b)
        return self.base(torch.einsum("nij,...nj->...ni", R, blocks).flatten(-2).to(x.dtype))

    def changed(self):
        """Return W R, by its name."""
        R = torch.block_diag(*self.rotations())
        return {"weight": stored(self.base, matrix(self.base).to(R.dtype) @ R)}


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
        self.order = list(base._parameters)
        for name in names:
            original = getattr(base, name).detach()
            trained = original.to(_like(base).dtype, copy=True)
            self.register_parameter(f"tuned_{name}", nn.Parameter(trained))
            delattr(base, name)
            base.register_buffer(name, original)

    def tuned(self):
        """Return the trained parameters, by the names of their originals."""
        return {name: getattr(self, f"tuned_{name}") for name in self.settings["names"]}

    def changed(self):
        """Return the trained parameters in the dtypes of their originals, by these's names."""
        return {name: p.to(getattr(self.base, name).dtype) for name, p in self.tuned().items()}

    def adapted(self, *args, **kwargs):
        return torch.func.functional_call(self.base, self.changed(), args, kwargs)

    def merged(self):
        """Return the base with the trained parameters in the place of the originals."""
        return self._in_order(super().merged())

    def removed(self):
        """Return the base with the originals in their place."""
        originals = {name: self.base._buffers[name] for name in self.settings["names"]}
        return self._in_order(with_parameters(self.base, originals))

    def _in_order(self, base):
        for name in self.order:
            base._parameters[name] = base._parameters.pop(name)
        return base


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
        read = x if self.settings["parallel"] else y
        h = F.relu(F.linear(read.to(self.down_weight.dtype), self.down_weight, self.down_bias))
        scale = self.settings["scale"] if self.settings["parallel"] else 1.0
        return (y + scale * F.linear(h, self.up_weight, self.up_bias)).to(y.dtype)


class PromptTuning(Adapter):
    """Put trained vectors before a sequence: (B, T, d) becomes (B, P + T, d).

    Parameters
    ----------
    base : nn.Module
        Embeds a sequence: a module whose attribute `embedding_dim` is d, such as
        `torch.nn.Embedding`, or whose last linear layer has d outputs. The model above it must
        accept P more tokens, and read its result off the others.
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
        d = getattr(base, "embedding_dim", None) or sizes(base)[1]
        super().__init__(base, num_virtual_tokens=num_virtual_tokens)
        like = _like(base)
        self.prompt = nn.Parameter(normal((num_virtual_tokens, d), std, like, generator))

    def adapted(self, *args, **kwargs):
        tokens = self.base(*args, **kwargs)  # (B, T, d)
        return torch.cat([self.prompt.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], 1)


class PrefixTuning(Adapter):
    """softmax(Q [P_k; K]' / sqrt(d_head)) [P_v; V], trained keys and values before the others.

    The keys and values are trained as they are; Li & Liang reach them through a feed-forward
    network during training, which is left out here.

    Parameters
    ----------
    base : nn.Module
        An attention module with attributes `n_heads` and `d_head` whose ``forward(x, prefix)``
        takes P_k and P_v, each of shape (1, n_heads, P, d_head), the same for each row.
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
                " and forward(x, prefix) with keys and values of shape (1, n_heads, P, d_head)"
            )
        super().__init__(base, num_virtual_tokens=num_virtual_tokens)
        shape = (2, base.n_heads, num_virtual_tokens, base.d_head)
        self.prefix = nn.Parameter(normal(shape, std, _like(base), generator))

    def adapted(self, x, *args, **kwargs):
        k, v = self.prefix.to(x.dtype)[:, None]  # each (1, H, P, d_head)
        return self.base(x, *args, prefix=(k, v), **kwargs)


def make_room(model, args, kwargs):
    """Hand a model the tokens with the prompt before them, and a mask with ones before it.

    A forward pre-hook: models of `transformers` may go by the length of their ``input_ids``, and
    would pad a mask that is too short at its end.

    Parameters
    ----------
    model : nn.Module
        With `input_ids` and `attention_mask` among what its forward takes.
    args, kwargs : tuple, dict
        What it is called with.

    Raises
    ------
    ValueError
        If a cache or positions are given, as `generate` does: each step would get a prompt.
    """
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    read = (model.get_encoder() if two else model).modules()  # what input_ids go to
    prompts = [m for m in read if isinstance(m, PromptTuning) and m.enabled]
    given = kwargs | dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if len(prompts) != 1 or ids is None:
        return None
    if extra := [n for n in ("past_key_values", "position_ids") if given.get(n) is not None]:
        raise ValueError(f"a prompt goes before whole sequences: call the model without {extra}")
    if mask is not None and mask.shape[1:] == ids.shape[1:]:
        given["attention_mask"] = F.pad(mask, (len(prompts[0].prompt), 0), value=1)
    if getattr(model, "get_input_embeddings", lambda: None)() is prompts[0]:
        given |= dict(input_ids=None, inputs_embeds=prompts[0](ids))
    return (), given


def check_tokens(num_virtual_tokens):
    """Refuse a number of virtual tokens below one.

    Parameters
    ----------
    num_virtual_tokens : int
    """
    if not isinstance(num_virtual_tokens, Integral) or num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens={num_virtual_tokens} must be an integer, 1 or more")
