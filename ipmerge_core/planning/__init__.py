"""Decide what a merge does before a byte is read: options, scope, preview, plan, recipes."""
