#!/usr/bin/env python3
"""Join the global descriptors of one model and the patches of another."""

import sys

from patchnetvlad.commands.models import combine_models

if __name__ == "__main__":
    sys.exit(combine_models())
