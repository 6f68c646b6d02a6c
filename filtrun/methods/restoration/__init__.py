"""Methods for image restoration: their own training steps, losses and run-time controls."""
