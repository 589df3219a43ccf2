"""What is left of a run for people: the run record."""
