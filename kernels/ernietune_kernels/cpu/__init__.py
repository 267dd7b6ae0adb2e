"""C for a CPU through ctypes: products with stored weights, decode steps, what a training step repeats."""
