"""Tasks, their rows, and who holds which."""
