"""Mathematics of one matrix and of two: singular values, directions, similarity."""
