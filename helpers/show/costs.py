"""Figures of what techniques cost."""

import numpy as np
from matplotlib.patches import Patch, Rectangle

from helpers.show.drawings import FROZEN
from helpers.show.figures import COLOURS, HATCHES


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


def plot_fits(ax, totals, budgets):
    """Draw what each model needs by each recipe as a table, coloured by the budget that holds it.

    Parameters
    ----------
    ax : Axes
    totals : dict of str to dict of str to float
        Model to recipe to bytes, the same recipes for each model.
    budgets : sequence of float
        Three sizes in GB of 10^9 bytes, ascending.
    """
    recipes = list(next(iter(totals.values())))
    shades = ["#009E73", "#9AD5C1", "#FBE3B0", FROZEN]  # fits the first, second, third; none
    for row, of in enumerate(totals.values()):
        for column, total in enumerate(of.values()):
            fits = sum(total > gb * 1e9 for gb in budgets)
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=shades[fits]))
            text = f"{total / 1e9:,.0f}" if total >= 1e11 else f"{total / 1e9:.3g}"
            weight = "bold" if fits == 0 else "normal"
            ax.text(column, row, f"{text} GB", ha="center", va="center", weight=weight)
    names = [*(f"fits in {gb} GB" for gb in budgets), "in none"]
    handles = [Patch(facecolor=c, label=n) for c, n in zip(shades, names, strict=True)]
    ax.set(xlim=(-0.5, len(recipes) - 0.5), ylim=(len(totals) - 0.5, -0.5))
    ax.set(xticks=range(len(recipes)), xticklabels=recipes)
    ax.set(yticks=range(len(totals)), yticklabels=totals)
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles))
    ax.grid(False)
