"""What the paper compares itself with, and the flags that choose it.

To follow the paper's own model you need none of it.
"""
