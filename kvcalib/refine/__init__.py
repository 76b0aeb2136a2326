"""Codebooks tuned by gradient on the divergence that they cause."""
