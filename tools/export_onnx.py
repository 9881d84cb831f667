#!/usr/bin/env python3
"""Write the model as ONNX, as a torch.export archive or as TorchScript."""

import sys

from patchnetvlad.commands.export import export_onnx

if __name__ == "__main__":
    sys.exit(export_onnx())
