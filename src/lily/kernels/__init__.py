"""Fast kernels of the method, tested against `lily.functional` in values and gradients."""
