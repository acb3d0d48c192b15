"""Run models on samples and store the statistics that data-aware methods need."""
