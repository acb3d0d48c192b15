"""Threads, devices, processes and long-running jobs."""
