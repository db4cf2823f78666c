"""What only a GPU can show: that everything is right there, and how fast and how small training is.

`python -m tests.gpu` runs all of it within ten minutes; docs/gpu.md says what has to be on the machine.
"""
