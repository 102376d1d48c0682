"""The frozen bottom of an encoder, computed once: every step and score goes on from there."""

from collections.abc import Mapping

import torch
from torch import nn

from helpers.data import check_whole
from helpers.models import Encoder
from helpers.training.batches import _labelled
from helpers.training.scoring import _by_batch


class CachedRows(dict):
    """What an encoder's block `first` reads: "hidden" of shape (n, T, d), "mask" of shape (n, T).

    `train`, `evaluate` and `predict` take it in place of the tokens that it comes from, on any
    model with the same frozen bottom. Made by `cache_prefix`.

    Parameters
    ----------
    rows : dict of str to Tensor
    first : int
    stamp : dict of str to tuple
        Each parameter's and buffer's dtype and digest below that block, and switched adapters.
    """

    def __init__(self, rows, first, stamp):
        super().__init__(rows)
        self.first, self.stamp = first, stamp
        self.settings = {"first": first}

    def like(self, rows):
        """Return other rows of the same bottom.

        Parameters
        ----------
        rows : dict of str to Tensor

        Returns
        -------
        CachedRows
        """
        return CachedRows(rows, self.first, self.stamp)

    def check(self, model):
        """Refuse a model whose bottom is not the one that made these rows, or is not frozen.

        Parameters
        ----------
        model : nn.Module

        Raises
        ------
        ValueError
            Naming what is trainable, differs, or drops out.
        """
        found = _stamp(_bottom(model, self.first)[1])
        if found != self.stamp:
            names = sorted(found.keys() ^ self.stamp.keys())
            names = names or [k for k in found if found[k] != self.stamp[k]]
            told = f"{names[0]!r} is not what it was when these rows were cached"
            raise ValueError(f"{told}: call cache_prefix again")


def cache_prefix(model, X, *, first=None, batch_size=256, device="auto"):
    """Run an encoder's frozen blocks once for each row: training goes on from their outputs.

    ``train(model, cache_prefix(model, X), y, ...)`` takes the same steps as on X, without the
    frozen blocks' share of each.

    Parameters
    ----------
    model : nn.Module
        A `helpers.models.Encoder`, or a model whose ``encoder`` is one.
    X : dict of Tensor, or Dataset
        Token ids and their mask, as the encoder takes them.
    first : int, optional
        The block to go on at; None is the lowest with a trainable parameter, and one beyond the
        last where the head alone is trained. Models with another bottom have a cache each.
    batch_size : int, default=256
        Rows per forward pass.
    device : str or torch.device, default="auto"
        As in `train`.

    Returns
    -------
    CachedRows
        Of n x T x d numbers.

    Raises
    ------
    ValueError
        If there is no such encoder, or what is below `first` is trainable or has dropout: its
        outputs would change from step to step.
    """
    first, bottom = _bottom(model, first)
    X, _ = _labelled(X, None)
    if not isinstance(X, Mapping) or "ids" not in X:
        raise ValueError(f'X is a {type(X).__name__}, expected a dict with "ids" and "mask"')

    def _run(batch):
        h = bottom["embed"](batch["ids"])  # (B, T, d)
        if h.shape[:2] != batch["ids"].shape:
            raise ValueError("a prompt comes before each row, cached rows have none: train on X")
        for block in bottom["blocks"]:
            h = block(h, batch.get("mask"))
        return h

    hidden = _by_batch(_run, model, X, batch_size, device)
    rows = {"hidden": hidden}
    if "mask" in X:
        rows["mask"] = torch.as_tensor(X["mask"])[:, : hidden.shape[1]].to(hidden.device)
    return CachedRows(rows, first, _stamp(bottom))


def _bottom(model, first):
    """Return `first`, or the default, and what is below it: frozen, and without dropout."""
    check_whole(0, first=first)
    encoder = getattr(model, "encoder", model)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"a {type(model).__name__} has no helpers.models.Encoder to cache rows of")
    if first is None:
        parts = (encoder.embed, *encoder.blocks)
        trained = [any(p.requires_grad for p in part.parameters()) for part in parts]
        first = max([*trained, True].index(True) - 1, 0)
    bottom = nn.ModuleDict({"embed": encoder.embed, "blocks": encoder.blocks[:first]})
    for name, p in bottom.named_parameters():
        if p.requires_grad:
            cure = "freeze it, or let cache_prefix go on at a lower block"
            raise ValueError(f"{name!r} is trainable, so its outputs go stale: {cure}")
    for name, module in bottom.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0)
        if isinstance(rate, float) and rate > 0:
            told = f"{name!r} drops out {rate:g} anew at each step"
            raise ValueError(f"{told}, rows of cache_prefix do not: set it to 0")
    return first, bottom


def _stamp(bottom):
    stamp = {n: (t.dtype, t.shape, _digest(t)) for n, t in bottom.state_dict().items()}
    return stamp | {n: m.enabled for n, m in bottom.named_modules() if hasattr(m, "enabled")}


def _digest(t):
    """Return the sum of a tensor's bits, read as integers."""
    t, kinds = t.flatten(), {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = t.numel() * t.itemsize % 8 == t.data_ptr() % 8 == 0  # eight bytes at once are faster
    return int(t.view(kinds[8 if whole else t.itemsize]).sum(dtype=torch.int64))
