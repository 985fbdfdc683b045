"""Procedural audio-video worlds with exact ground truth: training data and verifiable rewards for small models."""
