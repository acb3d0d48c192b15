"""The Try it tab: one question, two models side by side."""
