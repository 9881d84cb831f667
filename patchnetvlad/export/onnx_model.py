"""The model for other runtimes: ONNX, torch.export and TorchScript files of encoder, pooling and WPCA, checked."""

import io
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from patchnetvlad.errors import UserError
from patchnetvlad.files import writing
from patchnetvlad.images import IMAGENET_MEAN, IMAGENET_STD
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD, intra_normalised

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # largest difference of a descriptor's entries that an export may have
_OPSET = 18

Run = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]
"""Pictures N×3×H×W to the global and all patch descriptors."""


class ExportableModel(nn.Module):
    """A PlaceModel as one graph: RGB pictures N×3×H×W with values 0 to 1, as they are after resizing, to a tuple.

    The tuple holds the global descriptors (N×D), then for each patch size the patch descriptors (N×P×D, row-major).
    The normalisation of pictures is inside. Window means are average pooling of all clusters at once: the same sums
    as the model's, at the price of N·K·C·H·W floats of memory.
    """

    def __init__(self, model: PlaceModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("_mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        normalised = (pictures - self.get_buffer("_mean")) / self.get_buffer("_std")
        feature_map = self.model.encoder(normalised)
        pool = self.model.pool
        if not isinstance(pool, NetVLAD):
            return (self.model.whiten(pool(feature_map)),)
        local, assignment = pool.assign(feature_map)
        outputs = [self.model.whiten(pool.aggregate(local, assignment))]
        branch = self.model.patch_branch
        if branch is not None:
            pool = branch.pool
            local, assignment = pool.assign(branch.encoder(normalised))
        if self.model.patch_sizes:
            residuals = (local.unsqueeze(3) - pool.centroids) * assignment.unsqueeze(4)  # N×H×W×K×C
            residuals = residuals.flatten(3).permute(0, 3, 1, 2)  # N×(K·C)×H×W
            for size, stride in zip(self.model.patch_sizes, self.model.strides, strict=True):
                means = F.avg_pool2d(residuals, size, stride).flatten(2).transpose(1, 2)  # N×P×(K·C)
                outputs.append(self.model.whiten_patches(intra_normalised(means.unflatten(2, pool.centroids.shape))))
        return tuple(outputs)

    @property
    def output_names(self) -> list[str]:
        """global, then patches_2 and so on."""
        return ["global", *(f"patches_{size}" for size in self.model.patch_sizes)]


@dataclass(frozen=True)
class ExportCheck:
    """An export against torch: the pictures' shape, the largest difference, and seconds a batch of either."""

    shape: tuple[int, ...]
    difference: float
    torch_seconds: float
    exported_seconds: float


def export_onnx(
    model: PlaceModel, height: int, width: int, path: Path, dynamic_size: bool = False
) -> list[ExportCheck]:
    """Write an ONNX file for any batch, and compare it with torch in onnxruntime.

    height, width: of the pictures; with dynamic_size any other fits too, down to the largest patch. Raises UserError
    when the exporter is not installed or its result differs from torch.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(f"ONNX export needs {error.name} (pip install 'patchnetvlad[onnx]')") from error
    exportable = ExportableModel(model).eval()
    program = _program(exportable, height, width, dynamic_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=["pictures"],
            output_names=exportable.output_names,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, _description(model))
    with writing(path) as file:
        onnx.save(proto, file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return _check(exportable, lambda pictures: session.run(None, {"pictures": pictures}), height, width, dynamic_size)


def export_torch(
    model: PlaceModel, height: int, width: int, path: Path, dynamic_size: bool = False
) -> list[ExportCheck]:
    """The same as a torch.export archive (.pt2), which torch.export.load reads without this package."""
    # Archives cannot hold weights in channels last, as VGG16 has them
    exportable = ExportableModel(deepcopy(model)).eval().to(memory_format=torch.contiguous_format)
    program = _program(exportable, height, width, dynamic_size)
    archive = io.BytesIO()
    torch.export.save(program, archive)
    with writing(path) as file:
        file.write(archive.getbuffer())
    return _check(exportable, _in_torch(torch.export.load(path).module()), height, width, dynamic_size)


def export_script(
    model: PlaceModel, height: int, width: int, path: Path, dynamic_size: bool = False
) -> list[ExportCheck]:
    """The same as TorchScript (.pt), which torch.jit.load and C++ read; pictures of any size fit in any case.

    It is traced: torch.jit.script cannot compile the model. One picture is the example, because RootSIFT parts a batch
    into its pictures, and a trace would keep their number.
    """
    exportable = ExportableModel(model).eval()
    model.describe(torch.zeros(1, 3, height, width))  # refuses patches larger than the feature map
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # newer torch calls TorchScript deprecated; others hint at sizes, checked below
        traced = torch.jit.trace(exportable, torch.rand(1, 3, height, width))
        with writing(path) as file:
            torch.jit.save(traced, file)
        loaded = torch.jit.load(path)
    return _check(exportable, _in_torch(loaded), height, width, dynamic_size=True)


def _in_torch(loaded: Callable[[Tensor], tuple[Tensor, ...]]) -> Run:
    def run(pictures: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            return [output.numpy() for output in loaded(torch.from_numpy(pictures))]

    return run


def _program(exportable: ExportableModel, height: int, width: int, dynamic_size: bool) -> torch.export.ExportedProgram:
    shape: dict[int, object] = {0: torch.export.Dim.DYNAMIC}
    if dynamic_size:
        shape |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    pictures = torch.zeros(2, 3, height, width)
    exportable.model.describe(pictures)  # refuses patches larger than the feature map
    with torch.no_grad():
        return torch.export.export(exportable, (pictures,), dynamic_shapes=(shape,), strict=False)


def _check(exportable: ExportableModel, run: Run, height: int, width: int, dynamic_size: bool) -> list[ExportCheck]:
    """Compare on random pictures of a few shapes; raises UserError beyond TOLERANCE, or when one is not taken."""
    shapes = [(1, 3, height, width), (3, 3, height, width)]
    if dynamic_size:
        shapes.append((2, 3, height + 3 * 16, width + 5))
    generator = np.random.default_rng(0)
    checks = []
    for shape in shapes:
        blocks = generator.random((*shape[:2], -(-shape[2] // 8), -(-shape[3] // 8)), dtype=np.float32)
        pictures = blocks.repeat(8, axis=2).repeat(8, axis=3)[:, :, : shape[2], : shape[3]].copy()
        normalised = (pictures - np.array(IMAGENET_MEAN, np.float32)[:, None, None]) / np.array(
            IMAGENET_STD, np.float32
        )[:, None, None]
        exportable.model.describe(torch.from_numpy(normalised))
        started = time.perf_counter()
        described = exportable.model.describe(torch.from_numpy(normalised))
        torch_seconds = time.perf_counter() - started
        try:
            run(pictures)
        except AssertionError as error:  # torch.export guards what its graph holds for
            reason = str(error).partition("\n")[0]
            raise UserError(f"the export does not take pictures {shape}: {reason} (export one size)") from error
        started = time.perf_counter()
        outputs = run(pictures)
        exported_seconds = time.perf_counter() - started
        expected: Sequence[Tensor] = (described.global_, *described.patches)
        difference = max(
            float(np.abs(output - reference.numpy()).max()) if reference.numel() else 0.0
            for output, reference in zip(outputs, expected, strict=True)
        )
        if difference > TOLERANCE:
            raise UserError(f"the export differs from torch by {difference:.2g} for pictures {shape}")
        checks.append(ExportCheck(shape, difference, torch_seconds, exported_seconds))
    return checks


def _description(model: PlaceModel) -> dict[str, str]:
    geometry = model.geometry
    return {
        "input": "RGB pictures N×3×H×W, values 0 to 1, resized as for the model",
        "backbone": model.backbone,
        "patch_sizes": ",".join(map(str, model.patch_sizes)),
        "strides": ",".join(map(str, model.strides)),
        "encoder_stride": str(geometry.stride),
        "first_center": str(geometry.first_center),
    }
