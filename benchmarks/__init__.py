"""Measurements of speed and memory. Ratios within one process, because machines are shared and noisy."""
