"""What is made of a trained encoder: its features, probes of them, and studies of many."""

METHODS = ("knn", "linear")  # of probes
