"""Textbook versions in float64, written from the papers; they share no code with the package."""
