"""What a bundle is compared with: the PyTorch model, its recorded runs, and measures of agreement."""
