"""Choosing what a recipe leaves to choose: a search over its knobs, and a sweep over the shapes that a budget buys."""
