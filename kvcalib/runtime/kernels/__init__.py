"""Fused Triton kernels over a packed layer; this package and `view`, `support` import without triton."""
