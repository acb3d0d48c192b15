"""Search merging coefficients, and compare optimizers on tables of past results."""
