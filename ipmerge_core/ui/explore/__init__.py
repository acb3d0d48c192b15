"""The Explore tab: the layer map of a pair and the spectra of one matrix."""
