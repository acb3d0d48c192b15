"""Analyse a model pair matrix by matrix and store the results in a pack."""
