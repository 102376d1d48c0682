"""The published model: small enough to check by hand."""

from torch import nn


class MLP(nn.Module):
    """logits = head(backbone(x)), the base model of the series.

    The backbone holds three linear layers, each followed by a ReLU:
    ``in_features -> hidden -> hidden -> n_features``; the head is one linear layer.
    Initial weights come from torch's global random stream, as in `torch.nn.Linear`.

    Parameters
    ----------
    in_features : int, default=20
    hidden : int, default=64
    n_features : int, default=32
        Width of what the backbone hands to the head.
    n_classes : int, default=4
    """

    def __init__(self, in_features=20, *, hidden=64, n_features=32, n_classes=4):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, n_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(n_features, n_classes)

    def forward(self, x):
        return self.head(self.backbone(x))  # (B, in_features) -> (B, n_features) -> (B, n_classes)
