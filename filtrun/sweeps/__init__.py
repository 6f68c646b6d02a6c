"""Sweeps on several worker processes: claims on cells, the board the workers share, workers, and who starts them."""
