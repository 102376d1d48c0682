"""What a first pass shows to be untrainable is refused, with the model as it was."""

from contextlib import contextmanager

from torch import nn

BATCH_NORM = nn.modules.batchnorm._BatchNorm


@contextmanager
def _first_step(model, rows):
    """Refuse what a first pass shows to be untrainable, with the model's statistics put back."""
    buffers = [(b, b.clone()) for b in model.buffers() if b.is_floating_point() or b.ndim == 0]
    hooks = _batch_norm_hooks(model, rows.n, rows.batch_size)
    model.zero_grad()  # some optimizers fill gradients with 0 where none must be
    try:
        yield
        _check_reached(model)
    except BaseException:
        for buffer, before in buffers:
            buffer.copy_(before)
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _check_reached(model):
    names = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"no gradient reaches {', '.join(map(repr, names[:3]))}{more}: freeze what the loss"
            " does not use, or have the model call these layers, not read their weights (under"
            " gradient checkpointing set use_reentrant=False)"
        )


def _batch_norm_hooks(model, n, batch_size):
    """Look at what batch norm reads, if one row will be a batch: one value has no variance."""
    first = min(batch_size, n)
    if (n % batch_size or first) > 1:
        return []
    works = [b for b in range(2, n + 1) if b > batch_size and n % b != 1]
    cure = f"batch_size={works[0]} works" if works else "it takes two rows"
    names = {m: name for name, m in model.named_modules() if isinstance(m, BATCH_NORM)}

    def _look(module, args):
        x = args[0]  # (B, C, ...)
        if x.numel() <= first * x.shape[1]:
            more = "" if module.running_mean is None else ", or freeze the layer"
            raise ValueError(
                f"batch_size={batch_size} makes a batch of one row of {n}, which batch norm"
                f" {names[module]!r} cannot standardise: {cure}{more}"
            )

    active = [m for m in names if m.training or m.running_mean is None]
    return [m.register_forward_pre_hook(_look) for m in active]
