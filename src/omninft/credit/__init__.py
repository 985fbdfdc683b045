"""Who is responsible for a score: branches (routing), layers (surgery), regions (attention)."""
