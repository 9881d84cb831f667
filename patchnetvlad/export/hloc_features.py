"""Global descriptors for hloc: an HDF5 file with `global_descriptor` under each picture's name."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import UserError
from patchnetvlad.files import writing_hdf5


def write_hloc_descriptors(path: Path, names: Sequence[str], descriptors: NDArray[np.float32]) -> None:
    """Write N×D descriptors under N names; hloc's pairs_from_retrieval reads the file.

    The file appears complete or not at all. Raises UserError for a name that HDF5 cannot hold: one
    that is also the folder of another, or is there twice.
    """
    with writing_hdf5(path) as file:
        for name, descriptor in zip(names, descriptors, strict=True):
            try:
                file.create_group(name).create_dataset("global_descriptor", data=descriptor)
            except ValueError as error:
                raise UserError(f"{path}: picture {name!r}: HDF5 has that name already ({error})") from error
