"""Evaluation tasks with reference answers, and answer extraction."""
