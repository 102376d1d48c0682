"""What the notebooks import, a room each: data, models, training, peft, study, show."""
