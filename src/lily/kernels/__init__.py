"""The method, fast: held to `lily.functional` in values and gradients."""
