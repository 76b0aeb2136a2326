"""Pictures of results, from plain numbers."""
