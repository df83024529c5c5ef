"""The losses: masked-patch error and cross-entropy over a vocabulary split across ranks.

Every function returns `(sum, count)`: sums and counts are added over micro-batches and data-parallel ranks and divided
once. `impl="auto"` takes the compiled kernels of `csrc/` where they are built and the torch implementation otherwise.
"""

from megamug.losses.cross_entropy import vocab_parallel_cross_entropy
from megamug.losses.linear_cross_entropy import linear_cross_entropy
from megamug.losses.masked_patch import masked_patch_loss, patchify

__all__ = ["linear_cross_entropy", "masked_patch_loss", "patchify", "vocab_parallel_cross_entropy"]
