"""Rows to learn from: checks, the published task, texts, your own embeddings."""

# fmt: off
from helpers.data.embeddings import Rows, check_arrays, load_rows
from helpers.data.rows import (
    Task, as_rows, check_classes, check_parameters, check_rows, check_texts, check_whole,
    encode_labels
)
from helpers.data.tasks import few_per_class, published_task, shifted_domain
from helpers.data.texts import (
    Texts, are_words, articles, documentation, draw, headlines, read_texts
)
