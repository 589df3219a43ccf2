"""Training: which tracks meet in a batch, which states of them are read, and the loop over both. Knows no Ray."""
