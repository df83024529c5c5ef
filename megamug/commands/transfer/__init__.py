"""What is made of a trained encoder: its features, and probes of them."""
