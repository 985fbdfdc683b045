"""The optimiser step of the current policy, and what is measured around it."""
