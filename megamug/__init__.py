"""megamug trains MUG, a vision transformer that learns by generating pixels and captions, in every parallel layout."""

__version__ = "0.1.0"
