"""Data sets: splits of uint8 image tensors or image files, class-wise views and epoch batches."""
