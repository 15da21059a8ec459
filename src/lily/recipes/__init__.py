"""What to train on what: schema, data, models, tasks and training."""
