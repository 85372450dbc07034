"""The optimizer on NumPy and GPU buffers, without any framework: what the public modules are made of."""
