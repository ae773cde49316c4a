"""What a model costs, what a memory is worth, and what this machine can do."""
