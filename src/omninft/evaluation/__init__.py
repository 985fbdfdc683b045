"""Evaluation: paired comparison, benchmarks, their results, the leaderboard."""
