"""Estimators: recipes, formulas and baselines."""
