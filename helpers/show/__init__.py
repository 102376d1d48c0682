"""What a notebook shows: tables and sources, figures, drawings made from the model."""

# fmt: off
from helpers.show.costs import plot_fits, plot_memory
from helpers.show.drawings import plot_frozen, plot_injected
from helpers.show.figures import (
    STYLE, look, plot_bands, plot_classes, plot_dots, plot_grid, plot_guide, plot_seeds,
    plot_tradeoff
)
from helpers.show.records import record
from helpers.show.tables import read_gain, read_table, show_source, show_table, show_verdicts
