"""What is run beside the story: python -m tools.NAME."""
