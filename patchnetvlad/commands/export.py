"""The commands of tools/ that write the model and its descriptors for other people's tools."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.errors import UserError
from patchnetvlad.export.hloc_features import write_hloc_descriptors
from patchnetvlad.export.onnx_model import export_onnx as to_onnx
from patchnetvlad.export.onnx_model import export_script as to_script
from patchnetvlad.export.onnx_model import export_torch as to_torch
from patchnetvlad.feature_store import FeatureStore
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.paths import require_file
from patchnetvlad.weights import load_model

EXPORTS = {".onnx": to_onnx, ".pt2": to_torch, ".pt": to_script}  # by the file's ending


def export_onnx(arguments: Sequence[str] | None = None) -> int:
    """Write the model as ONNX, as a torch.export archive or as TorchScript."""
    parser = Parser(
        "Write encoder, pooling and WPCA, for global and patch descriptors, as an ONNX file (by the ending .pt2, as a "
        "torch.export archive, by .pt, as TorchScript). Input: RGB pictures with values 0 to 1, any number at once. "
        "The result is compared with torch, and both are timed.",
        "export_onnx.py",
    )
    parser.add_config_options("builtin.ini")
    parser.add_argument("--output_path", required=True, metavar="FILE", help="file to write (.onnx, .pt2 or .pt)")
    parser.add_argument("--dynamic_size", action="store_true", help="accept pictures of any size, not only the INI's")

    def command(args: argparse.Namespace) -> None:
        config = command_line.configuration(args)
        size, path = config.feature_extract, Path(args.output_path)
        if path.suffix not in EXPORTS:
            raise UserError(f"--output_path {path}: must end in {', '.join(EXPORTS)}")
        if min(size.imageresizeh, size.imageresizew) <= 0:
            raise UserError("[feature_extract] imageresizeh, imageresizew: a size is needed (with --dynamic_size too)")
        model, _ = load_model(config)
        for check in EXPORTS[path.suffix](model, size.imageresizeh, size.imageresizew, path, args.dynamic_size):
            print(
                f"{'×'.join(map(str, check.shape))}: differs from torch by {check.difference:.1e} at most; "
                f"{1000 * check.exported_seconds:.0f} ms, torch {1000 * check.torch_seconds:.0f} ms"
            )
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    return command_line.run(parser, command, arguments)


def export_hloc(arguments: Sequence[str] | None = None) -> int:
    """Write stored global descriptors as hloc's HDF5 file."""
    parser = Parser("Write the global descriptors of a features folder as hloc's HDF5 file.", "export_hloc.py")
    parser.add_argument("--features_dir", required=True, metavar="DIR", help="folder that feature_extract.py wrote")
    parser.add_argument("--dataset_file_path", required=True, metavar="LIST", help="the list it was made from")
    parser.add_argument("--dataset_root_dir", default="", metavar="DIR", help="folder that the list's names start from")
    parser.add_argument("--output_path", required=True, metavar="FILE", help="HDF5 file to write")

    def command(args: argparse.Namespace) -> None:
        root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
        pictures = read_image_list(require_file(args.dataset_file_path, "dataset_imagenames"), root)
        with FeatureStore.open(Path(args.features_dir), pictures) as store:
            descriptors = store.global_
        write_hloc_descriptors(Path(args.output_path), pictures.names, descriptors)
        print(f"{len(descriptors)} descriptors of {descriptors.shape[1]} dimensions in {args.output_path}")

    return command_line.run(parser, command, arguments)
