"""Read checkpoints, match their tensors, check their lineage, and write merged models."""
