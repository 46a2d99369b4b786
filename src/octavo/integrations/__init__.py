"""Octavo inside other people's programs, one file per program, and the calls that tie all parts together."""
