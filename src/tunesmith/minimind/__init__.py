"""MiniMind's weight files (.pth): names, sizes, reading, writing, and their LoRA files."""
