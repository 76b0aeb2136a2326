"""What a packed cache costs: perplexity, divergence from the unquantized model, and bytes."""
