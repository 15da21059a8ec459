"""Base models and data splits that need no hub."""
