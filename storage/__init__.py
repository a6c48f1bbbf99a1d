"""What lies on the disk: weights, checkpoints, data sets, logs."""
