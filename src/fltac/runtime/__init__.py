"""What drives a run: the loop's surroundings, the run directory, checkpoints and progress."""
