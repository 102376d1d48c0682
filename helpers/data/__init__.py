"""Rows to learn from: checks, the published task, texts, your own embeddings."""

# fmt: off
from helpers.data.embeddings import Rows, check_arrays, check_budgets, load_rows, split
from helpers.data.rows import (
    Task, as_rows, check_classes, check_parameters, check_rows, check_whole
)
from helpers.data.tasks import few_per_class, published_task, shifted_domain
from helpers.data.texts import Texts, articles, documentation, draw, headlines, read_texts
