"""The Merge tab: method, check, confirmation, run and result."""
