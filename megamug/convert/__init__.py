"""Checkpoints of other libraries: one file per foreign format, each a table of names and of how tensors are turned.

`megamug.convert.conversion` runs the tables; megamug convert is its command line.
"""
