"""Pages of run folders and of fine-tunings, from their files alone. Imports no torch."""
