"""What a trained encoder is worth: its features, and what can be learned from them."""
