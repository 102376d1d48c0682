"""One function per figure, each draws on the Axes it is given; and source code as output."""

import ast
import inspect

from IPython.display import Markdown, display
from matplotlib.patches import Patch

from helpers.models import stages

# Okabe & Ito's palette, told apart by colour-blind readers; each colour has a marker of its own
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00"]
MARKERS = "osD^vPX*"
TRAINED, FROZEN = "#E69F00", "#D9E2EC"

STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.size": 10,
}


def show_source(*functions):
    """Display the source of functions as a notebook output, without their docstrings.

    Parameters
    ----------
    *functions : callable or class
    """
    for function in functions:
        source = inspect.getsource(function)
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                doc = node.body[0]
                lines[doc.lineno - 1 : doc.end_lineno] = [None] * (doc.end_lineno - doc.lineno + 1)
        code = "\n".join(line for line in lines if line is not None)
        display(Markdown(f"```python\n{code}\n```"))


def plot_classes(ax, points, y, *, filled=True, label="class"):
    """Scatter rows in a plane, one colour and marker for each class.

    Parameters
    ----------
    ax : Axes
    points : array of shape (n, 2)
    y : array of shape (n,)
        Labels 0..C-1, at most 8 classes.
    filled : bool, default=True
        Hollow markers tell a second domain from the first in the same Axes.
    label : str, default="class"
        Legend text, followed by the class number.
    """
    for c in sorted(set(y.tolist())):
        ax.scatter(
            *points[y == c].T,
            s=22,
            marker=MARKERS[c],
            facecolor=COLOURS[c] if filled else "none",
            edgecolor=COLOURS[c],
            linewidth=0.9,
            label=f"{label} {c}",
        )
    ax.set(xlabel="first principal component", ylabel="second principal component")


def plot_losses(ax, histories):
    """Draw training loss against epoch, one line for each history.

    Parameters
    ----------
    ax : Axes
    histories : dict of str to dict
        Label to what `helpers.training.train` returned.
    """
    for (label, history), colour, dash in zip(
        histories.items(), COLOURS, ["-", "--", "-.", ":"] * 2, strict=False
    ):
        epochs = range(1, len(history["loss"]) + 1)
        ax.plot(epochs, history["loss"], dash, color=colour, linewidth=1.8, label=label)
    ax.set(xlabel="epoch", ylabel="training loss (nats per row)", ylim=(0, None))
    ax.legend()


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
                edgecolor="#52606D",
                linewidth=0.8,
            )
            text = dict(ha="center", va="center", fontsize=9)
            box = dict(facecolor="white", edgecolor="none", pad=1.2, alpha=0.85)
            ax.text(column + 0.47, row, f"{name}\n{n:,}", bbox=box, **text)
    ax.set(yticks=range(len(models)), xticks=[], xlabel="input side  →  output side")
    ax.set_yticklabels(models)
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines[:].set_visible(False)
    patches = [
        Patch(facecolor=TRAINED, edgecolor="#52606D", label="trained"),
        Patch(facecolor=FROZEN, edgecolor="#52606D", hatch="///", label="frozen"),
    ]
    ax.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
