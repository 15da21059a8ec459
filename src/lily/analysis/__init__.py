"""Insight: what was shared, how much rank was gained, what the routers do.

Numbers first: pure functions on adapters, models and recorded statistics that give frozen values with `to_dict()`.
Pictures are made of those values: `lily.analysis.plots` with matplotlib, `lily.insight` as one HTML page.
"""
