#!/usr/bin/env python3
"""List the pictures of a folder in natural order."""

import sys

from patchnetvlad.commands.datasets import gen_image_file_list

if __name__ == "__main__":
    sys.exit(gen_image_file_list())
