"""Figures of what techniques cost, and what they give for it."""

from itertools import product

import numpy as np
from matplotlib.text import Text
from matplotlib.ticker import LogLocator

from helpers.show.drawings import FAINT, FROZEN, LINE
from helpers.show.figures import COLOURS, HATCHES, MARKERS


def plot_memory(ax, parts):
    """Draw the memory that each method needs as a bar of its components, the total at its end.

    Parameters
    ----------
    ax : Axes
    parts : dict of str to dict of str to float
        Method to its components, such as "weights" or "gradients", in bytes; at most 8 of them.
    """
    components = dict.fromkeys(name for part in parts.values() for name in part)
    most = max(sum(part.values()) for part in parts.values())
    unit, size = next((u for u in (("GB", 1e9), ("MB", 1e6)) if most >= u[1]), ("kB", 1e3))
    left = np.zeros(len(parts))
    for i, name in enumerate(components):
        width = np.array([part.get(name, 0) for part in parts.values()]) / size
        style = dict(color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", linewidth=0)
        ax.barh(range(len(parts)), width, left=left, height=0.66, label=name, **style)
        left += width
    for row, total in enumerate(left):
        text = f"{total:,.0f} {unit}" if total >= 100 else f"{total:.3g} {unit}"
        ax.annotate(text, (total, row), (4, 0), textcoords="offset points", va="center")
    ax.set(yticks=range(len(parts)), yticklabels=parts, ylim=(len(parts) - 0.5, -0.5))
    ax.set(xlim=(0, 1.15 * most / size), xlabel=f"memory ({unit})")
    ax.grid(False, axis="y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(components))


def _label(ax, places):
    """Write each name by its point: the nearest place where it and its leader cover nothing."""
    ax.figure.draw_without_rendering()  # settles the layout, so that places are known in points
    scale = 72 / ax.figure.dpi
    centres = {name: ax.transData.transform(place) * scale for name, place in places.items()}
    bars = [ax.transData.transform(c.lines[2][0].get_segments()[0]) * scale for c in ax.containers]
    lows = np.array([c - 8 for c in centres.values()] + [bar[0] - 1 for bar in bars])
    highs = np.array([c + 8 for c in centres.values()] + [bar[1] + 1 for bar in bars])
    corners = ax.bbox.get_points() * scale
    turns = np.deg2rad([0, 180, *range(15, 180, 15), *range(195, 360, 15)])
    style = dict(ha="center", va="center", fontsize=8, zorder=4, textcoords="offset points")
    style["arrowprops"] = dict(arrowstyle="-", color=LINE, linewidth=0.6, shrinkA=0, shrinkB=5)
    for name in sorted(places, key=lambda name: -centres[name][1]):
        text = ax.annotate(name, places[name], (0, 0), **style)
        text.set_in_layout(False)
        half = Text.get_window_extent(text).size * scale / 2 + 1
        for radius, turn in product(range(8, 200, 4), turns):
            offset = np.array([np.cos(turn), np.sin(turn)]) * (radius + half)
            start = 12 / np.linalg.norm(offset) if radius > 8 else 1
            line = centres[name] + np.linspace(start, 1, 40)[:, None] * offset
            reach = np.r_[np.full((39, 2), 0.5), [half]] if radius > 8 else half
            low, high = line - reach, line + reach
            clash = ((low[:, None] < highs) & (high[:, None] > lows)).all(-1).any()
            if not clash and (low > corners[0]).all() and (high < corners[1]).all():
                break
        lows, highs = np.r_[lows, low], np.r_[highs, high]
        text.set_position(offset)
        text.arrow_patch.set_visible(radius > 8)


def plot_front(ax, points, front, *, xscale="log"):
    """Draw accuracy against a cost; what nothing beats is joined by a line and named.

    Parameters
    ----------
    ax : Axes
        In its final size: labels are placed where they overlap nothing.
    points : dict of str to tuple of (float, Summary)
        Cost and accuracy (%).
    front : sequence of str
        Names on the Pareto front, from cheap to dear.
    xscale : str, default="log"
        Of the axis of costs.
    """
    for name, (cost, s) in points.items():
        on = name in front
        colour = COLOURS[1] if on else FAINT
        arms = [[s.mean - s.low], [s.high - s.mean]]
        ax.errorbar(cost, s.mean, arms, color=colour, linewidth=1, zorder=2)
        style = dict(color=colour, marker="D" if on else "o", edgecolor="white", zorder=3)
        ax.scatter(cost, s.mean, s=45 if on else 22, **style)
    line = [points[name] for name in front]
    style = dict(color=COLOURS[1], linewidth=1, drawstyle="steps-post", zorder=1)
    ax.plot([cost for cost, _ in line], [s.mean for _, s in line], **style)
    ax.set(xscale=xscale, ylabel="accuracy (%)")
    if xscale == "log":
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
        ax.minorticks_off()
    ax.margins(0.15, 0.25)  # room for names
    _label(ax, {name: (points[name][0], points[name][1].mean) for name in front})
    for text in ax.texts:  # the front's line passes behind
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})


def plot_fits(ax, totals, checkpointed, budgets):
    """Draw the memory that each model needs by each recipe, on a logarithmic axis with budgets.

    A filled marker keeps all activations, a hollow one recomputes them (gradient checkpointing).

    Parameters
    ----------
    ax : Axes
    totals, checkpointed : dict of str to dict of str to float
        Model to recipe to bytes; at most 8 recipes, the same for each model.
    budgets : sequence of float
        GB of 10^9 bytes, drawn as vertical lines.
    """
    recipes = list(next(iter(totals.values())))
    for i, recipe in enumerate(recipes):
        style = dict(edgecolor=COLOURS[i], marker=MARKERS[i], s=50, linewidth=1.4, zorder=3)
        for row, model in enumerate(totals):
            y = row + 0.7 * ((i + 0.5) / len(recipes) - 0.5)  # a lane each: totals may be equal
            pair = [totals[model][recipe] / 1e9, checkpointed[model][recipe] / 1e9]
            ax.plot(pair, [y, y], color=COLOURS[i], linewidth=1, zorder=2)
            ax.scatter(pair[1], y, facecolor="white", **style)
            ax.scatter(pair[0], y, facecolor=COLOURS[i], label=None if row else recipe, **style)
    ax.scatter([], [], s=50, facecolor="white", edgecolor=LINE, label="with checkpointing")
    for gb in budgets:
        ax.axvline(gb, color=LINE, linestyle="--", linewidth=1, zorder=1)
        place = dict(xycoords=("data", "axes fraction"), textcoords="offset points", ha="center")
        ax.annotate(f"{gb} GB", (gb, 1), (0, 3), color=LINE, **place)
    for row in range(1, len(totals)):
        ax.axhline(row - 0.5, color=FROZEN, linewidth=1, zorder=0)
    ax.set(xscale="log", xlabel="memory of a training step (GB)")
    ax.set(yticks=range(len(totals)), yticklabels=totals, ylim=(len(totals) - 0.5, -0.5))
    ax.grid(False, axis="y")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=5)
