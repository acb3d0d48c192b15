"""Compare the models of a pair matrix by matrix; the result is a pack of small records."""
