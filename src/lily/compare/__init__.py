"""Comparing methods on one recipe: the same rows in the same order, equal budgets, several seeds, paired tests."""
