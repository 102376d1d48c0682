"""Studies: many seeds, intervals, verdicts; a module for each part; a decision on your rows."""

from helpers.study.decide import Recommendation, Scores, cross_validate, recommend
from helpers.study.seeds import percent, reproducible, run_seeds, stream
from helpers.study.verdicts import (
    DRIFT,
    Comparison,
    Summary,
    cheapest,
    close_calls,
    compare,
    compare_folds,
    compare_pairs,
    summarize,
    summarize_folds,
)
