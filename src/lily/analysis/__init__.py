"""Analysis of adapters: sharing, rank of the updates, and routing.

Pure functions of adapters, models and recorded statistics return frozen values with `to_dict()`. `lily.analysis.plots`
draws them with matplotlib, `lily.insight` as one HTML page.
"""
