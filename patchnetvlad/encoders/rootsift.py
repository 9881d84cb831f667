"""Dense upright RootSIFT: an encoder that needs no training and no downloaded weights."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from patchnetvlad.encoders.interface import Encoder
from patchnetvlad.images import IMAGENET_MEAN, IMAGENET_STD
from patchnetvlad.patch_grid import EncoderGeometry
from patchnetvlad.products import is_recorded

STRIDE = 16  # pixels between positions, as in VGG16, so that grids and pixel thresholds mean the same
CELLS = 4  # cells along each side of a descriptor
ORIENTATIONS = 8
_CELL_SIZE, _SMOOTHING = 16, 1.0  # pixels, unless told otherwise
ONE_THREAD = 1 << 14  # elements that torch leaves to one thread, all of them in whole vectors
CLIP = 0.2  # largest entry after the first L2 normalisation (Lowe 2004)

LUMA = (0.299, 0.587, 0.114)  # weights of ITU-R BT.601


def _blur_radius(smoothing: float) -> int:
    return math.ceil(3 * smoothing)


def _window(cell_size: int) -> int:
    return (CELLS + 1) * cell_size


def _cell_padding(cell_size: int) -> int:
    return (_window(cell_size) - STRIDE) // 2


def _geometry(cell_size: int, smoothing: float) -> EncoderGeometry:
    around = 1 + _blur_radius(smoothing)  # the central difference, and the blur before it
    return EncoderGeometry(STRIDE, _window(cell_size) + 2 * around, _cell_padding(cell_size) + around)


class DenseRootSIFT(Encoder):
    """A 128-channel RootSIFT descriptor (Arandjelović, Zisserman 2012) every 16 pixels, upright.

    Channel (4·row + column)·8 + orientation holds the histogram entry of one cell; orientation b collects
    gradients that point at b·45° (x to the right, y down). Every descriptor is a non-negative unit vector.
    Descriptor j lies at the centre of its 4×4 cells, 16·j + 7.5 pixels; cells beyond the border are empty.

    cell_size: side of a cell in pixels, even. smoothing: standard deviation in pixels of the Gaussian before
    the gradients. contrast_floor: mean gradient in a descriptor's window, in grey levels (of 255) a pixel,
    below which the descriptor fades into the uniform vector: flat walls become one and the same descriptor
    instead of amplified noise.
    """

    channels = CELLS * CELLS * ORIENTATIONS
    geometry = _geometry(_CELL_SIZE, _SMOOTHING)

    def __init__(self, cell_size: int = _CELL_SIZE, smoothing: float = _SMOOTHING, contrast_floor: float = 0.5) -> None:
        super().__init__()
        if cell_size < 4 or cell_size % 2:
            raise ValueError(f"cell_size must be an even number of pixels, 4 or more, not {cell_size}")
        if smoothing <= 0 or contrast_floor <= 0:
            raise ValueError("smoothing and contrast_floor must be positive")
        blur = _gaussian(smoothing)
        cells = _cell_kernels(cell_size)
        self._blur_radius = _blur_radius(smoothing)
        self._cell_padding = _cell_padding(cell_size)
        # The L2 norm of the histogram of a window of even contrast and one orientation: 16 equal cells.
        self._norm_floor = contrast_floor / 255 * cell_size**2 * CELLS
        self.geometry = _geometry(cell_size, smoothing)
        # Not in the state dict: they follow from the settings, and a checkpoint holds only what was fitted.
        self.register_buffer("_blur", blur, persistent=False)
        self.register_buffer("_cells", cells, persistent=False)
        grey = [weight * std for weight, std in zip(LUMA, IMAGENET_STD, strict=True)]
        self.register_buffer("_grey", torch.tensor(grey), persistent=False)
        self._grey_offset = sum(weight * mean for weight, mean in zip(LUMA, IMAGENET_MEAN, strict=True))

    def forward(self, pictures: Tensor) -> Tensor:
        """Describe a batch: N×3×H×W, ImageNet-normalised → N×128×⌊H/16⌋×⌊W/16⌋, unit vectors over channels.

        Computed and returned in float32 (float64 for float64 pictures), whatever autocast says.
        """
        if pictures.device.type == "cpu" and not is_recorded() and len(pictures) > 1:
            # The orientation planes of one picture stay in the cache; those of a batch take half as long again.
            # An exported graph takes any number of pictures, so that it cannot part them.
            return torch.cat([self.forward(picture) for picture in pictures.split(1)])
        dtype = torch.float64 if pictures.dtype == torch.float64 else torch.float32
        with torch.autocast(pictures.device.type, enabled=False):
            histograms = self._histograms(self._oriented_gradients(self._to_grey(pictures.to(dtype))))
            return _root_normalise(histograms, self._norm_floor)

    def _to_grey(self, pictures: Tensor) -> Tensor:
        """Undo the ImageNet normalisation: N×3×H×W → N×1×H×W luma in 0..1."""
        weights = self.get_buffer("_grey").to(pictures.dtype)
        return (pictures * weights[:, None, None]).sum(dim=1, keepdim=True) + self._grey_offset

    def _oriented_gradients(self, grey: Tensor) -> Tensor:
        """Gradient magnitude shared out between the two nearest of 8 orientations: N×1×H×W → N×8×H×W."""
        kernel = self.get_buffer("_blur").to(grey.dtype)
        margin = self._blur_radius + 1
        grey = F.pad(grey, (margin,) * 4, mode="replicate")
        grey = F.conv2d(F.conv2d(grey, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
        along_x = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2
        along_y = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
        magnitude = (along_x.square() + along_y.square()).sqrt()  # torch.hypot has no ONNX counterpart
        position = _angles(along_y, along_x) * (ORIENTATIONS / (2 * math.pi))  # in bins, −4..4
        bins = torch.arange(ORIENTATIONS, dtype=grey.dtype, device=grey.device).view(1, -1, 1, 1)
        distance = (position - bins).abs()  # 0..11
        distance = torch.minimum(distance, (distance - ORIENTATIONS).abs())
        return magnitude * (1 - distance).clamp(min=0)

    def _histograms(self, gradients: Tensor) -> Tensor:
        """Pool into 4×4 cells around every position, linear along both axes: N×8×H×W → N×128×h×w."""
        batch, orientations, height, width = gradients.shape
        kernels = self.get_buffer("_cells").to(gradients.dtype)
        planes = gradients.reshape(batch * orientations, 1, height, width)
        padding = self._cell_padding
        planes = F.conv2d(planes, kernels[:, None, :, None], stride=(STRIDE, 1), padding=(padding, 0))
        planes = planes.reshape(batch * orientations * CELLS, 1, -1, width)
        planes = F.conv2d(planes, kernels[:, None, None, :], stride=(1, STRIDE), padding=(0, padding))
        map_height, map_width = planes.shape[-2:]
        planes = planes.reshape(batch, orientations, CELLS * CELLS, map_height, map_width)
        return planes.transpose(1, 2).reshape(batch, self.channels, map_height, map_width)  # cell-major


def _angles(along_y: Tensor, along_x: Tensor) -> Tensor:
    """torch.atan2, on a processor the same for any number of threads.

    Each thread's last few elements, which fill no vector, are computed by another function that rounds differently.
    """
    if along_y.device.type != "cpu" or is_recorded():
        return torch.atan2(along_y, along_x)
    pairs = zip(along_y.flatten().split(ONE_THREAD), along_x.flatten().split(ONE_THREAD), strict=True)
    return torch.cat([torch.atan2(*pair) for pair in pairs]).view_as(along_y)


def _gaussian(sigma: float) -> Tensor:
    """Weights of a Gaussian that sum to 1, cut at 3 sigma: float32, odd length."""
    radius = _blur_radius(sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    return (weights / weights.sum()).float()


def _cell_kernels(cell_size: int) -> Tensor:
    """Weight of every pixel of a window (5 cells long) in each of the 4 cells along one axis: 4×5·cell_size.

    Cell centres lie one cell apart around the middle of the window; a pixel's weight falls linearly from 1 at
    the centre of a cell to 0 one cell further.
    """
    length = _window(cell_size)
    pixels = torch.arange(length, dtype=torch.float64)
    centers = (length - 1) / 2 + (torch.arange(CELLS, dtype=torch.float64) - (CELLS - 1) / 2) * cell_size
    return (1 - (pixels - centers[:, None]).abs() / cell_size).clamp(min=0).float()


def _root_normalise(histograms: Tensor, norm_floor: float) -> Tensor:
    """RootSIFT over channels: L2, clip, L1, square root; uniform entries fill up what lacks to the floor."""
    norm = torch.linalg.vector_norm(histograms, dim=1, keepdim=True)
    strength = (norm / norm_floor).clamp(max=1)
    uniform = (1 - strength) / math.sqrt(histograms.shape[1])
    clipped = (histograms / norm.clamp(min=norm_floor) + uniform).clamp(max=CLIP)
    return (clipped / clipped.sum(dim=1, keepdim=True)).sqrt()
