"""Patch-NetVLAD: visual place recognition by NetVLAD retrieval and re-ranking with multi-scale patch descriptors."""

__version__ = "0.2.0"
