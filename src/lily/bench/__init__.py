"""Measuring what an adapter costs: contestants side by side in one process, as ratios."""
