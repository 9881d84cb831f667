"""Patch-NetVLAD: visual place recognition by NetVLAD retrieval and re-ranking with multi-scale patch descriptors."""
