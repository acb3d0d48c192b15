"""Load models, render prompts and stream answers."""
