"""The Hugging Face model: loading it, cutting text into token sequences, and tapping its attention."""
