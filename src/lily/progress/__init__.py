"""What a command tells while it works: stages, time left, evaluations, and a log. Knows nothing of Lily."""
