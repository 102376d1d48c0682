"""Drawings made from the model itself: what is frozen, and what was injected where."""

from operator import attrgetter

import torch
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from helpers.models import stages
from helpers.peft import (
    BottleneckAdapter,
    DoRA,
    LoRA,
    PrefixTuning,
    Projection,
    PromptTuning,
    Tuned,
    VeRA,
    adapters,
)
from helpers.peft.layers import IA3, OFT

TRAINED, FROZEN, LINE, FAINT = "#E69F00", "#D9E2EC", "#52606D", "#A9B5C2"

# where `plot_injected` draws a layer, in points: left, right, height above the signal's line
BOXES = {
    "embed": (6, 42, 0),
    "blocks.0.norm1": (66, 100, 0),
    "blocks.0.attention.q_proj": (126, 162, 36),
    "blocks.0.attention.k_proj": (126, 162, 0),
    "blocks.0.attention.v_proj": (126, 162, -36),
    "blocks.0.attention.out_proj": (246, 288, 0),
    "blocks.0.norm2": (338, 372, 0),
    "blocks.0.feed_forward.fc1": (394, 426, 0),
    "blocks.0.feed_forward.fc2": (456, 488, 0),
    "norm": (556, 588, 0),
    "head": (608, 640, 0),
}

SYMBOLS = {  # of a technique, as in its equation, and the tensors that they stand for
    LoRA: {"B": "lora_B", "A": "lora_A"},
    DoRA: {"m": "magnitude", "B": "lora_B", "A": "lora_A"},
    VeRA: {"v": "lambda_b", "B": "projection.B", "u": "lambda_d", "A": "projection.A"},
    IA3: {"l": "ia3_l"},
    OFT: {"R": "oft_R"},
    BottleneckAdapter: {"U": "up_weight", "D": "down_weight"},
    PromptTuning: {"P": "prompt"},
    PrefixTuning: {"P_k": "prefix", "P_v": "prefix"},
    Tuned: {},
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
            ax.barh(
                row,
                0.94,
                left=column,
                height=0.66,
                color=TRAINED if trained else FROZEN,
                hatch=None if trained else "///",
                edgecolor=LINE,
                linewidth=0.8,
            )
            text = dict(ha="center", va="center", fontsize=9)
            box = dict(facecolor="white", edgecolor="none", pad=1.2, alpha=0.85)
            label = f"{name.removeprefix('encoder.')}\n{n:,}"
            ax.text(column + 0.47, row, label, bbox=box, **text)
    ax.set(yticks=range(len(models)), xticks=[], xlabel="input side  →  output side")
    ax.set_yticklabels(models)
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines[:].set_visible(False)
    _legend_of_colours(ax, LINE, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def plot_injected(ax, model):
    """Draw where a technique sits in a transformer: its first block, and what is trained in it.

    Parameters
    ----------
    ax : Axes
        About 9 x 2.6 inches.
    model : TinyTransformer
        With or without adapters.

    Raises
    ------
    ValueError
        If the blocks differ, or an adapter is of a kind or at a place that has no drawing.
    """
    blocks = list(getattr(model, "blocks", []))
    bare = {_without_base(name): module for name, module in model.named_modules()}
    if not BOXES.keys() <= bare.keys():
        raise ValueError(f"a {type(model).__name__} is not drawn, only a TinyTransformer is")
    if len({_structure(block) for block in blocks}) > 1:
        raise ValueError("the blocks differ, so that the first one cannot stand for all")
    others = tuple(f"blocks.{i}." for i in range(1, len(blocks)))
    found = {_without_base(n): m for n, m in adapters(model).items() if not n.startswith(others)}
    added = {id(p) for adapter in found.values() for p in adapter.parameters(recurse=False)}
    tuned = {name for name, adapter in found.items() if isinstance(adapter, Tuned)}
    _draw_signal(ax, len(blocks))
    for name, (left, right, y) in BOXES.items():
        on = any(p.requires_grad and id(p) not in added for p in bare[name].parameters())
        low = 21 if tuned & {name, f"{name}.project"} else 8  # room for the strip
        style = {} if on else dict(hatch="////", edgecolor=FAINT)
        _box(ax, left, y - low, right - left, low + 8, on, gid=name, zorder=2, **style)
        _write(ax, (left + right) / 2, y, name.rpartition(".")[2])
    for name, adapter in found.items():
        inside = [box for n, box in BOXES.items() if f"{n}.".startswith(f"{name}.")]
        inside = inside or [BOXES.get(name.rpartition(".")[0])]
        if type(adapter) not in SYMBOLS or inside == [None] or name == "blocks.0":
            raise ValueError(f"no drawing of {type(adapter).__name__} at {name!r}")
        _draw_adapter(ax, adapter, inside)
    ax.set(xlim=(0, 660), ylim=(-82, 74), aspect="equal")
    ax.axis("off")
    _legend_of_colours(ax, FAINT, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)


def _structure(block):
    """Return a block's layers, less the projection that one holds for all, and what trains."""
    layers = ((n, m) for n, m in block.named_modules() if not isinstance(m, Projection))
    shown = tuple((n, type(m), m.extra_repr()) for n, m in layers)
    return shown, tuple(p.requires_grad for p in block.parameters())


def _draw_signal(ax, n_blocks):
    """Draw what every technique leaves as it is: the lines, the softmax, the sums, the frame."""
    frame = dict(boxstyle="round,pad=0,rounding_size=6", edgecolor=FAINT, linestyle="--")
    ax.add_patch(FancyBboxPatch((52, -80), 480, 152, facecolor="none", zorder=0, **frame))
    same = ", same for the other blocks" if n_blocks > 1 else ""
    ax.text(60, 66, f"block 1 of {n_blocks}{same}", va="center", fontsize=8, color=LINE)
    line = dict(color=LINE, linewidth=1, zorder=1)
    ax.plot([0, 654], [0, 0], **line)
    ax.plot(654, 0, ">", color=LINE, markersize=4)
    ax.plot([186, 108, 108, 186], [36, 36, -36, -36], **line)  # to the queries and the values
    for fork, end in ((58, 320), (332, 520)):
        ax.plot([fork, fork, end, end], [0, 54, 54, 0], **line)
        _sum(ax, end, 0, LINE, 10)
    _box(ax, 186, -58, 40, 102, False, facecolor="white", zorder=2)
    _write(ax, 206, 0, "softmax")
    if n_blocks > 1:
        _write(ax, 544, 0, "⋯", backgroundcolor="white", weight="bold")


def _draw_adapter(ax, adapter, inside):
    """Draw an adapter where its class puts it; `inside` are the boxes of what it wraps."""
    left, right = min(box[0] for box in inside), max(box[1] for box in inside)
    x, y, low = (left + right) / 2, inside[-1][2], min(box[2] for box in inside)
    on = {s: attrgetter(n)(adapter).requires_grad for s, n in SYMBOLS[type(adapter)].items()}
    line = dict(color=TRAINED if any(on.values()) else LINE, linewidth=1, zorder=0.9)
    if isinstance(adapter, Tuned):
        norm = isinstance(adapter.base, torch.nn.LayerNorm)
        symbols = {"weight": r"\gamma" if norm else "W", "bias": r"\beta" if norm else "b"}
        trained = any(p.requires_grad for p in adapter.tuned().values())
        names = ", ".join(symbols.get(name, name) for name in adapter.tuned())
        _cells(ax, x, y - 13.5, {names: trained}, width=right - left - 4)
    elif isinstance(adapter, PromptTuning):
        _tokens(ax, left, y - 19, "P", on["P"])
        ax.plot([left + 34, right + 7, right + 7], [y - 19, y - 19, y], **line)
        ax.plot(right + 7, y, "o", color=line["color"], markersize=3)
    elif isinstance(adapter, PrefixTuning):
        for (symbol, trained), box in zip(on.items(), inside[1:3], strict=True):
            _tokens(ax, left - 4, box[2] - 19, symbol, trained)
            ax.plot([left + 30, 186], [box[2] - 19] * 2, **line)
    elif isinstance(adapter, OFT) or adapter.settings.get("feedforward"):
        _cells(ax, left - 8, y, on)
    elif isinstance(adapter, IA3) or adapter.settings.get("parallel") is False:
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


def _without_base(name):
    return ".".join(part for part in name.split(".") if part != "base")


def _legend_of_colours(ax, edge, **place):
    trained = Patch(facecolor=TRAINED, edgecolor=LINE, label="trained")
    frozen = Patch(facecolor=FROZEN, edgecolor=edge, hatch="///", label="frozen")
    ax.legend(handles=[trained, frozen], ncols=2, **place)
