"""Which layers suffer from quantization, and how many bits go where."""
