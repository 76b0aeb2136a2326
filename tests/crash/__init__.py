"""What a crash, a signal, a full or a read-only disk leaves behind."""
