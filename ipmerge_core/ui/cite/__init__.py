"""The API & cite tab: the plan as code, commands and references."""
