#!/usr/bin/env python3
"""Write stored global descriptors as hloc's HDF5 file."""

import sys

from patchnetvlad.commands.export import export_hloc

if __name__ == "__main__":
    sys.exit(export_hloc())
