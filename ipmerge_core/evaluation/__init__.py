"""Measure models: batched answers, scores with intervals, paired tests."""
