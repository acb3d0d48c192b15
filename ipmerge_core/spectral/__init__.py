"""Singular value decompositions, similarity of spectra, and projected updates."""
