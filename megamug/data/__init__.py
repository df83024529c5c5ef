"""Image-text data: verified shards, one global order, decoding, captions.

A sample's way: `indexing` verifies a tar shard and writes its index, `sources` opens the indexed shards a configuration
names, `order` says which sample is next, `images` and `text` decode it, `loader` puts batches together ahead of time.
"""
