"""Threads, devices, processes and long runs: what the other packages run on."""
