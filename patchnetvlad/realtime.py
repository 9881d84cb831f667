"""Compare a camera's or video's frames with a reference frame as they come."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import UserError
from patchnetvlad.images import read_image
from patchnetvlad.recognizer import Comparison, PlaceRecognizer

logger = logging.getLogger(__name__)

Frame = NDArray[np.uint8]  # H×W×3 RGB


@dataclass(frozen=True)
class ComparedFrame:
    """One frame, counted from 1, and what came of comparing it with the reference."""

    number: int
    comparison: Comparison


Show = Callable[[ComparedFrame], str | None]
"""Shows a compared frame; answers the key pressed since the last call, or None."""


def frames(source: str | Path) -> Iterator[Frame]:
    """RGB frames of a video file, or of the camera of that number, until it ends."""
    name = str(source)
    capture = cv2.VideoCapture(int(name) if name.isdecimal() else name)
    try:
        if not capture.isOpened():
            raise UserError(f"{name}: cannot be opened as a camera or video (wrong number or path, or in use?)")
        while True:
            read, frame = capture.read()
            if not read:
                return
            yield np.ascontiguousarray(frame[..., ::-1])  # OpenCV delivers BGR
    finally:
        capture.release()


def follow(recognizer: PlaceRecognizer, stream: Iterator[Frame], show: Show, reference: Frame | None = None) -> int:
    """Compare each frame with the reference, which is the first frame unless given; returns the number of frames.

    Key n makes the present frame the reference, q ends. Every frame is described once, the reference too.
    """
    described_reference = None if reference is None else replace(recognizer.describe(reference)[0], name="reference")
    count = 0
    for count, frame in enumerate(stream, start=1):
        started = time.perf_counter()
        described = replace(recognizer.describe(frame)[0], name=f"frame {count}")
        if described_reference is None:
            described_reference = replace(described, name="reference")
        comparison = recognizer.compare(described, described_reference)
        logger.debug("frame %d: %.5f (%.2f s)", count, comparison.score, time.perf_counter() - started)
        key = show(ComparedFrame(count, comparison))
        if key == "n":
            described_reference = replace(described, name="reference")
        elif key == "q":
            break
    return count


def best_frame(
    recognizer: PlaceRecognizer, source: str | Path, reference: Path | None, report: Callable[[ComparedFrame], None]
) -> Comparison:
    """The frame of a video that scores highest against a picture, or against the video's own first frame.

    report is told every frame. The first frame does not count against itself. Raises UserError when no frame is left.
    """
    best: ComparedFrame | None = None

    def show(frame: ComparedFrame) -> None:
        nonlocal best
        report(frame)
        itself = reference is None and frame.number == 1
        if not itself and (best is None or frame.comparison.score > best.comparison.score):
            best = frame

    picture = None
    if reference is not None:
        picture = np.asarray(read_image(reference, recognizer.config.feature_extract.exif_rotation))
    follow(recognizer, frames(source), show, picture)
    if best is None:
        raise UserError(f"{source}: has no frame to compare (an empty or unreadable video?)")
    return best.comparison


def window() -> Show:
    """A matplotlib window that stays responsive between frames; raises UserError without a screen."""
    import matplotlib

    if matplotlib.get_backend().lower() == "agg":
        raise UserError("match_realtime: no screen for a window (a remote shell? try match_two on saved frames)")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 4.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    pressed: list[str] = []
    figure.canvas.mpl_connect("key_press_event", lambda event: pressed.append(str(event.key)))
    figure.canvas.mpl_connect("close_event", lambda event: pressed.append("q"))

    def show(frame: ComparedFrame) -> str | None:
        drawn = frame.comparison.figure()
        drawn.canvas.draw()
        axes.clear()
        axes.set_axis_off()
        axes.imshow(np.asarray(drawn.canvas.buffer_rgba()))  # type: ignore[attr-defined]
        plt.pause(0.001)
        return pressed.pop(0) if pressed else None

    return show
