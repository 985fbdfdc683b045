"""The optimiser step of the current policy, and the old policy's way after it."""
