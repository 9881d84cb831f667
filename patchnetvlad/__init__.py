"""Patch-NetVLAD: visual place recognition by NetVLAD retrieval and re-ranking with multi-scale patch descriptors."""

import os

# Torch reads this when it first allocates: huge pages for large tensors halve the time that the system spends on
# fresh memory. Without effect where the kernel offers none; set it to 0 to turn it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.2.0"
