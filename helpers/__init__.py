"""What the notebooks import: data, models, freezing, training, strategies, study, plotting."""
