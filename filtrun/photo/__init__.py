"""A user's own photographs: found, read with all they carry, run through a trained model, written back."""
