#!/usr/bin/env python3
"""Render a small tree in the layout of Mapillary Street-Level Sequences."""

import sys

from patchnetvlad.commands.examples import render_msls

if __name__ == "__main__":
    sys.exit(render_msls())
