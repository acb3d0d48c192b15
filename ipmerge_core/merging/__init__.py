"""Execute merge plans: estimate resources, merge tensors, write a complete model folder."""
