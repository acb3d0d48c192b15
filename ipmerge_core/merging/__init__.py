"""Carry out a plan: estimate, merge and write a complete model folder."""
