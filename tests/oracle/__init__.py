"""Textbook versions in float64 numpy, written from the papers; they share no code with the package."""
