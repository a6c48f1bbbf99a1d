"""The embedded world: what is drawn, and the parts that were pre-trained on it."""
