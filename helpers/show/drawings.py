"""Drawings made from the model itself: what is frozen, and what was injected where."""

from operator import attrgetter

import torch
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from helpers.models import Encoder, TextClassifier, stages
from helpers.peft import Projection, adapters, layers, lora

TRAINED, FROZEN, LINE, FAINT = "#E69F00", "#D9E2EC", "#52606D", "#A9B5C2"

# where `plot_injected` draws a layer, in points: left, right, height above the signal's line
BOXES = {
    "embed": (4, 40, 0),
    "attention.q_proj": (104, 140, 36),
    "attention.k_proj": (104, 140, 0),
    "attention.v_proj": (104, 140, -36),
    "attention.out_proj": (224, 266, 0),
    "norm1": (312, 346, 0),
    "feed_forward.fc1": (380, 412, 0),
    "feed_forward.fc2": (442, 474, 0),
    "norm2": (518, 552, 0),
    "head": (614, 642, 0),
}

SYMBOLS = {  # of a technique, as in its equation, and the tensors that they stand for
    lora.LoRA: {"B": "lora_B", "A": "lora_A"},
    lora.DoRA: {"m": "magnitude", "B": "lora_B", "A": "lora_A"},
    lora.VeRA: {"v": "lambda_b", "B": "projection.B", "u": "lambda_d", "A": "projection.A"},
    layers.IA3: {"l": "ia3_l"},
    layers.OFT: {"R": "oft_R"},
    layers.BottleneckAdapter: {"U": "up_weight", "D": "down_weight"},
    layers.PromptTuning: {"P": "prompt"},
    layers.PrefixTuning: {"P_k": "prefix", "P_v": "prefix"},
    layers.Tuned: {},
}


def plot_frozen(ax, models):
    """Draw each model's stages bottom to top as boxes: frozen or trained, with their counts.

    Parameters
    ----------
    ax : Axes
    models : dict of str to nn.Module
    """
    for row, model in enumerate(models.values()):
        for column, (name, stage) in enumerate(stages(model).items()):
            n = sum(p.numel() for p in stage.parameters())
            trained = any(p.requires_grad for p in stage.parameters())
            style = dict(color=TRAINED) if trained else dict(color=FROZEN, hatch="///")
            ax.barh(row, 0.94, 0.66, column, edgecolor=LINE, linewidth=0.8, **style)
            box = dict(facecolor="white", edgecolor="none", pad=1.2, alpha=0.85)
            label = f"{name.removeprefix('encoder.')}\n{n:,}"
            ax.text(column + 0.47, row, label, bbox=box, ha="center", va="center", fontsize=9)
    ax.set(yticks=range(len(models)), xticks=[], xlabel="input side  →  output side")
    ax.set_yticklabels(models)
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines[:].set_visible(False)
    _legend_of_colours(ax, LINE, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def plot_injected(ax, model):
    """Draw where a technique sits in an encoder: the first block that it adapts stands for all.

    Without adapters it is the last block. The other blocks are as the one drawn, or frozen.

    Parameters
    ----------
    ax : Axes
        About 9 x 2.6 inches.
    model : Encoder or TextClassifier
        With or without adapters.

    Raises
    ------
    ValueError
        If adapted or trained blocks differ, or an adapter's kind or place has no drawing.
    """
    encoder = model.encoder if isinstance(model, TextClassifier) else model
    if not isinstance(encoder, Encoder):
        raise ValueError(f"a {type(encoder).__name__} is not drawn, only an Encoder is")
    at, caption = _stand_in(encoder.blocks)
    others = tuple(f"blocks.{i}." for i in range(len(encoder.blocks)) if i != at)
    bare = {_place(name, at): module for name, module in model.named_modules()}
    found = {_place(n, at): m for n, m in adapters(model).items()}
    found = {name: m for name, m in found.items() if not name.startswith(others)}
    added = {id(p) for adapter in found.values() for p in adapter.parameters(recurse=False)}
    tuned = {n.removesuffix(".norm") for n, m in found.items() if isinstance(m, layers.Tuned)}
    _draw_signal(ax, caption, at > 0, at + 1 < len(encoder.blocks), "head" in bare)
    for name, (left, right, y) in BOXES.items():
        if name not in bare:  # an encoder has no head
            continue
        on = any(p.requires_grad and id(p) not in added for p in bare[name].parameters())
        low = 21 if name in tuned else 8  # room for the strip
        style = {} if on else dict(hatch="////", edgecolor=FAINT)
        _box(ax, left, y - low, right - left, low + 8, on, gid=name, zorder=2, **style)
        _write(ax, (left + right) / 2, y, name.rpartition(".")[2])
    for name, adapter in found.items():
        inside = [box for n, box in BOXES.items() if f"{n}.".startswith(f"{name}.")]
        inside = inside or [BOXES.get(name.removesuffix(".norm"))]  # the embedding's
        if type(adapter) not in SYMBOLS or inside == [None]:
            raise ValueError(f"no drawing of {type(adapter).__name__} at {name!r}")
        _draw_adapter(ax, adapter, inside)
    ax.set(xlim=(0, 668), ylim=(-82, 74), aspect="equal")
    ax.axis("off")
    _legend_of_colours(ax, FAINT, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)


def _place(name, at):
    """Return a module's name in block `at`, or in the model, as if no adapter wrapped it."""
    bare = ".".join(part for part in name.split(".") if part != "base")
    return bare.removeprefix("encoder.").removeprefix(f"blocks.{at}.")


def _stand_in(blocks):
    """Return the index of the block to draw, and a line that says what the others are."""
    adapted = [i for i, block in enumerate(blocks) if adapters(block)]
    at = adapted[0] if adapted else len(blocks) - 1
    shown = [_structure(block) for block in blocks]
    same = [i for i, block in enumerate(shown) if block == shown[at] and i != at]
    rest = [i for i, block in enumerate(shown) if block != shown[at]]
    if any(i in adapted or any(shown[i][1]) for i in rest):
        raise ValueError("adapted or trained blocks differ, so that one cannot stand for all")
    caption = f"block {at + 1} of {len(blocks)}"
    caption += f", same for {_numbers(same)}" if same else ""
    caption += f"; {_numbers(rest)}: frozen" if rest else ""
    return at, caption


def _structure(block):
    """Return a block's layers, less the projection that one holds for all, and what trains."""
    held = ((n, m) for n, m in block.named_modules() if not isinstance(m, Projection))
    shown = tuple((n, type(m), m.extra_repr()) for n, m in held)
    return shown, tuple(p.requires_grad for p in block.parameters())


def _numbers(blocks):
    """Return "block 1", "blocks 1 and 3", "blocks 1 to 3"."""
    first, *more = blocks = [i + 1 for i in blocks]
    if len(more) > 1 and more[-1] - first == len(more):
        return f"blocks {first} to {more[-1]}"
    return f"block{'s' * bool(more)} {' and '.join(map(str, blocks))}"


def _draw_signal(ax, caption, below, above, head):
    """Draw what every technique leaves as it is: the lines, the softmax, the sums, the frame."""
    frame = dict(boxstyle="round,pad=0,rounding_size=6", edgecolor=FAINT, linestyle="--")
    ax.add_patch(FancyBboxPatch((66, -80), 492, 152, facecolor="none", zorder=0, **frame))
    ax.text(74, 66, caption, va="center", fontsize=8, color=LINE)
    line, end = dict(color=LINE, linewidth=1, zorder=1), 664 if head else 580
    ax.plot([0, end], [0, 0], **line)
    ax.plot(end, 0, ">", color=LINE, markersize=4)
    ax.plot([164, 86, 86, 164], [36, 36, -36, -36], **line)  # to the queries and the values
    for fork, total in ((74, 300), (354, 506)):
        ax.plot([fork, fork, total, total], [0, 54, 54, 0], **line)
        _sum(ax, total, 0, LINE, 10)
    white = [("softmax", 164, -58, 40, 102), ("mean", 574, -8, 28, 16)]  # nothing to train
    for name, left, low, width, height in white[: 1 + head]:
        _box(ax, left, low, width, height, False, facecolor="white", zorder=2)
        _write(ax, left + width / 2, 0, name)
    for x in [57] * below + [566] * above:
        _write(ax, x, 0, "⋯", weight="bold", bbox=dict(facecolor="white", edgecolor="none", pad=1))


def _draw_adapter(ax, adapter, inside):
    """Draw an adapter where its class puts it; `inside` are the boxes of what it wraps."""
    left, right = min(box[0] for box in inside), max(box[1] for box in inside)
    x, y, low = (left + right) / 2, inside[-1][2], min(box[2] for box in inside)
    on = {s: attrgetter(n)(adapter).requires_grad for s, n in SYMBOLS[type(adapter)].items()}
    line = dict(color=TRAINED if any(on.values()) else LINE, linewidth=1, zorder=0.9)
    if isinstance(adapter, layers.Tuned):
        norm = isinstance(adapter.base, torch.nn.LayerNorm)
        symbols = {"weight": r"\gamma" if norm else "W", "bias": r"\beta" if norm else "b"}
        trained = any(p.requires_grad for p in adapter.tuned().values())
        names = ", ".join(symbols.get(name, name) for name in adapter.tuned())
        _cells(ax, x, y - 13.5, {names: trained}, width=right - left - 4)
    elif isinstance(adapter, layers.PromptTuning):
        _tokens(ax, left, y - 19, "P", on["P"])
        ax.plot([left + 34, right + 7, right + 7], [y - 19, y - 19, y], **line)
        ax.plot(right + 7, y, "o", color=line["color"], markersize=3)
    elif isinstance(adapter, layers.PrefixTuning):
        for (symbol, trained), box in zip(on.items(), inside[1:3], strict=True):
            _tokens(ax, left - 4, box[2] - 19, symbol, trained)
            ax.plot([left + 30, 186], [box[2] - 19] * 2, **line)
    elif isinstance(adapter, layers.OFT) or adapter.settings.get("feedforward"):
        _cells(ax, left - 8, y, on)
    elif isinstance(adapter, layers.IA3) or adapter.settings.get("parallel") is False:
        _cells(ax, right + 4 + 4.5 * len(on), y, on)
    else:
        fork, join, drop = (left - 18, right + 9, 32) if inside[1:] else (left - 5, right + 5, 18)
        ax.plot([fork, fork, join, join], [y, low - drop, low - drop, y], **line)
        _sum(ax, join, y, line["color"], 5)
        if "m" in on:  # DoRA's magnitude rescales the sum
            _cells(ax, join + 11, y, {"m": on.pop("m")}, width=11)
        _cells(ax, x, low - drop, on)


def _cells(ax, x, y, on, width=None):
    """Draw a small box around (x, y) with a cell for each symbol, orange if it is trained."""
    width = width or 9 * len(on)
    left, cell = x - width / 2, width / len(on)
    shape = dict(boxstyle="round,pad=0,rounding_size=3", facecolor="none", edgecolor=LINE)
    outline = FancyBboxPatch((left, y - 5.5), width, 11, linewidth=0.8, zorder=4, **shape)
    ax.add_patch(outline)
    for i, (symbol, trained) in enumerate(on.items()):
        _box(ax, left + i * cell, y - 5.5, cell, 11, trained, linewidth=0).set_clip_path(outline)
        _write(ax, left + (i + 0.5) * cell, y, f"${symbol}$")


def _tokens(ax, x, y, symbol, trained):
    _write(ax, x + 2, y, f"${symbol}$")
    for i in range(3):
        _box(ax, x + 9 * (i + 1), y - 3.5, 7, 7, trained)


def _sum(ax, x, y, colour, size):
    ax.plot(x, y, "o", color="white", markeredgecolor=colour, markersize=size, zorder=2)
    ax.plot(x, y, "+", color=colour, markersize=0.6 * size, zorder=3)


def _box(ax, left, bottom, width, height, trained, **style):
    colours = dict(facecolor=TRAINED if trained else FROZEN, edgecolor=LINE)
    style = colours | dict(linewidth=0.8, zorder=3) | style
    return ax.add_patch(Rectangle((left, bottom), width, height, **style))


def _write(ax, x, y, text, **style):
    ax.text(x, y, text, ha="center", va="center", fontsize=8, zorder=5, **style)


def _legend_of_colours(ax, edge, **place):
    trained = Patch(facecolor=TRAINED, edgecolor=LINE, label="trained")
    frozen = Patch(facecolor=FROZEN, edgecolor=edge, hatch="///", label="frozen")
    ax.legend(handles=[trained, frozen], ncols=2, **place)
