"""Compare a camera's or video's frames with a reference frame as they come."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import UserError
from patchnetvlad.figures import MatchedPair, match_figure
from patchnetvlad.pair_comparison import matched_pair
from patchnetvlad.recognizer import Description, PlaceRecognizer

logger = logging.getLogger(__name__)

Frame = NDArray[np.uint8]  # H×W×3 RGB
Show = Callable[[MatchedPair, float], str | None]
"""Shows a pair and its score; answers the key pressed since the last call, or None."""


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


def follow(recognizer: PlaceRecognizer, stream: Iterator[Frame], show: Show) -> int:
    """Compare each frame with the reference, at first the first one; returns the number of frames.

    Key n makes the present frame the reference, q ends. Every frame is described once.
    """
    reference: tuple[Frame, Description] | None = None
    count = 0
    for count, frame in enumerate(stream, start=1):
        started = time.perf_counter()
        (described,) = recognizer.describe(frame)
        if reference is None:
            reference = frame, described
        comparison = recognizer.compare(described, reference[1])
        logger.info("frame %d: %.5f (%.2f s)", count, comparison.score, time.perf_counter() - started)
        key = show(matched_pair(recognizer, frame, reference[0], described, reference[1], comparison), comparison.score)
        if key == "n":
            reference = frame, described
        elif key == "q":
            break
    return count


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

    def show(matched: MatchedPair, score: float) -> str | None:
        drawn = match_figure(matched, score)
        drawn.canvas.draw()
        axes.clear()
        axes.set_axis_off()
        axes.imshow(np.asarray(drawn.canvas.buffer_rgba()))  # type: ignore[attr-defined]
        plt.pause(0.001)
        return pressed.pop(0) if pressed else None

    return show
