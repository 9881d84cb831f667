"""Patch-NetVLAD: visual place recognition by NetVLAD retrieval and re-ranking with multi-scale patch descriptors."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchnetvlad.recognizer import PlaceRecognizer

__version__ = "0.2.0"
__all__ = ["PlaceRecognizer", "__version__"]


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: the commands start without torch."""
    if name == "PlaceRecognizer":
        from patchnetvlad.recognizer import PlaceRecognizer

        return PlaceRecognizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
