"""Rewards behind HTTP, for another environment or machine: what travels, the server, the client."""
