"""The panel that analyses other models: form, check, run."""
