"""Training: what is frozen, the loop, scores and features, strategies, new domains, costs."""

# fmt: off
from helpers.training.costs import (
    activation_bytes, operations, saved_bytes, step_memory, stored_bytes
)
from helpers.training.domain import (
    coral, density_ratio, information_maximization, label_ratio, match_statistics
)
from helpers.training.freezing import (
    Count, check_optimizer, count_parameters, freeze, freeze_to, param_groups, unfreeze
)
from helpers.training.loop import cross_entropy, train
from helpers.training.prefix import CachedRows, cache_prefix
from helpers.training.scoring import Score, evaluate, extract_features, predict, score
from helpers.training.seeding import reproducible
from helpers.training.strategies import (
    contrastive, fine_tune, fit, from_scratch, gradual_unfreezing, l2_sp,
    logistic_head
)
