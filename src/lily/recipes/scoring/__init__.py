"""How good is it? Inference, metrics, answers, baselines and forgetting."""
