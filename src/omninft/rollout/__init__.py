"""Sampling clips with a policy: solver, guidance, and what is recorded on the way."""
