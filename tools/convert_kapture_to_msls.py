#!/usr/bin/env python3
"""Turn a Kapture pairs file into predictions for the MSLS evaluator."""

import sys

from patchnetvlad.commands.datasets import convert_kapture_to_msls

if __name__ == "__main__":
    sys.exit(convert_kapture_to_msls())
