"""One worker a program; each runs in that program's own environment."""
