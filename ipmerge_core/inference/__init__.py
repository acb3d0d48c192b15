"""Run a model: load it, render its prompts, stream its answer."""
