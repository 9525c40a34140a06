"""What `torch_rounds.py` holds against ours: a problem, and plain PyTorch loops."""
