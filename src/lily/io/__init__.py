"""How are files read and written? Knows nothing of Lily."""
