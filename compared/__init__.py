"""What the paper compares its own way with. Each file stands alone; training needs none of them."""
