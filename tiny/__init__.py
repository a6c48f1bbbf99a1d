"""The embedded world of `--preset tiny`: what is drawn, and parts that were pre-trained on it."""
