"""Evaluate models: batched generation, scores with confidence intervals, paired tests."""
