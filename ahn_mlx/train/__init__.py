"""Training a memory: the base is frozen, and teaches with its full attention.

streams.py runs teacher and student, losses.py compares them, layerwise.py finds a first
memory without a backward pass, loop.py trains it end to end.
"""
