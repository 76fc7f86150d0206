"""Peak memory against the number of decoder blocks."""
