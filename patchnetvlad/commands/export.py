"""The model and its descriptors, written for other people's tools."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.commands import command_line
from patchnetvlad.commands.command_line import Parser
from patchnetvlad.errors import UserError
from patchnetvlad.image_lists import read_image_list
from patchnetvlad.paths import require_file

_ENDINGS = (".onnx", ".pt2", ".pt")


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
    return command_line.run(parser, _export_onnx, arguments)


def _export_onnx(args: argparse.Namespace) -> None:
    config = command_line.configuration(args)
    size, path = config.feature_extract, Path(args.output_path)
    if path.suffix not in _ENDINGS:
        raise UserError(f"--output_path {path}: must end in {', '.join(_ENDINGS)}")
    if size.picture_size is None:
        raise UserError("[feature_extract] imageresizeh, imageresizew: a size is needed (with --dynamic_size too)")
    command_line.require_checkpoint(config)
    from patchnetvlad.export import onnx_model
    from patchnetvlad.weights import load_model

    writers = (onnx_model.export_onnx, onnx_model.export_torch, onnx_model.export_script)
    write = dict(zip(_ENDINGS, writers, strict=True))[path.suffix]
    model, _ = load_model(config)
    for check in write(model, size.imageresizeh, size.imageresizew, path, args.dynamic_size):
        print(
            f"{'×'.join(map(str, check.shape))}: differs from torch by {check.difference:.1e} at most; "
            f"{1000 * check.exported_seconds:.0f} ms, torch {1000 * check.torch_seconds:.0f} ms"
        )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def export_hloc(arguments: Sequence[str] | None = None) -> int:
    """Write stored global descriptors as hloc's HDF5 file."""
    parser = Parser("Write the global descriptors of a features folder as hloc's HDF5 file.", "export_hloc.py")
    parser.add_argument("--features_dir", required=True, metavar="DIR", help="folder that feature_extract.py wrote")
    parser.add_argument("--dataset_file_path", required=True, metavar="LIST", help="the list it was made from")
    parser.add_argument("--dataset_root_dir", default="", metavar="DIR", help="folder that the list's names start from")
    parser.add_argument("--output_path", required=True, metavar="FILE", help="HDF5 file to write")
    return command_line.run(parser, _export_hloc, arguments)


def _export_hloc(args: argparse.Namespace) -> None:
    features = command_line.folder(args.features_dir, "--features_dir", "feature_extract.py")
    root = command_line.folder(args.dataset_root_dir, "--dataset_root_dir")
    pictures = read_image_list(require_file(args.dataset_file_path, "dataset_imagenames"), root)
    from patchnetvlad.export.hloc_features import write_hloc_descriptors
    from patchnetvlad.store.reading.feature_store import FeatureStore

    with FeatureStore.open(features, pictures) as store:
        descriptors = store.global_
    write_hloc_descriptors(Path(args.output_path), pictures.names, descriptors)
    print(f"{len(descriptors)} descriptors of {descriptors.shape[1]} dimensions in {args.output_path}")
