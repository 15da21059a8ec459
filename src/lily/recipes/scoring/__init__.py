"""Evaluation: inference, metrics, answers, baselines and forgetting."""
