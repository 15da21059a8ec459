"""How the trials of `lily tune`, `lily sweep` and `lily compare` are run, recorded, resumed and ranked."""
