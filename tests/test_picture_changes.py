"""Changes of a picture: known geometry, known amounts, and nothing at amount 0."""

import math

import numpy as np
import pytest

from patchnetvlad.config import CHANGES, TrainConfig
from patchnetvlad.errors import UserError
from patchnetvlad.picture_changes import (
    FIELD_OF_VIEW,
    Picture,
    changed,
    changed_view,
    jpeg,
    noise,
    roll,
    roll_homography,
    turn,
    turn_homography,
    zoom,
)

WIDTH, HEIGHT = 160, 120


@pytest.fixture
def picture() -> Picture:
    """Smooth colours with a white dot of 3×3 pixels right of the middle."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    colours = np.stack([columns * 0.8 + 40, rows + 60, 150 - columns * 0.5], axis=2).astype(np.uint8)
    colours[58:61, 99:102] = 255
    return colours


def dot(picture: Picture) -> tuple[float, float]:
    """Middle (x, y) of what is near white."""
    rows, columns = np.nonzero(picture.min(axis=2) > 190)
    return float(columns.mean()), float(rows.mean())


def apply(name: str, picture: Picture, amount: float, seed: int = 0) -> Picture:
    return CHANGES[name](picture, amount, np.random.default_rng(seed))


def moved(homography: np.ndarray, x: float, y: float) -> tuple[float, float]:
    place = homography @ (x, y, 1)
    return place[0] / place[2], place[1] / place[2]


@pytest.mark.parametrize("name", CHANGES)
def test_every_change(name: str, picture: Picture) -> None:
    before = picture.copy()
    np.testing.assert_allclose(apply(name, picture, 0.0).astype(int), picture, atol=1)
    strong = apply(name, picture, 1.0)
    assert strong.shape == picture.shape and strong.dtype == np.uint8
    assert np.abs(strong.astype(int) - picture).mean() > 0.05
    np.testing.assert_array_equal(strong, apply(name, picture, 1.0))
    np.testing.assert_array_equal(picture, before)


def test_turning_a_camera_by_known_angles() -> None:
    focal = WIDTH / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
    middle = (WIDTH - 1) / 2
    # What was 10° right of the axis lies on it once the camera has turned there.
    x, y = moved(turn_homography(10, WIDTH, HEIGHT), middle + focal * math.tan(math.radians(10)), (HEIGHT - 1) / 2)
    assert (x, y) == pytest.approx((middle, (HEIGHT - 1) / 2))
    there_and_back = turn_homography(-17, WIDTH, HEIGHT) @ turn_homography(17, WIDTH, HEIGHT)
    np.testing.assert_allclose(there_and_back / there_and_back[2, 2], np.eye(3), atol=1e-9)


def test_rolling_by_a_quarter() -> None:
    x, y = moved(roll_homography(90, 2.0, 101, 101), 60, 50)
    assert (x, y) == pytest.approx((50, 70))  # clockwise: what was to the right is below, twice as far


@pytest.mark.parametrize("name", ["turn", "roll", "zoom"])
def test_the_dot_follows_the_geometry(name: str, picture: Picture) -> None:
    x, y = dot(picture)
    found = dot(apply(name, picture, 0.5))
    if name == "zoom":
        expected = [roll_homography(0, math.sqrt(2), WIDTH, HEIGHT)]
    elif name == "roll":
        expected = [roll_homography(side * 15, 1, WIDTH, HEIGHT) for side in (-1, 1)]
    else:
        expected = [turn_homography(side * 15, WIDTH, HEIGHT) for side in (-1, 1)]
    distances = [math.dist(moved(homography, x, y), found) for homography in expected]
    assert min(distances) < 0.5


@pytest.mark.parametrize("amount", [0.1, 0.5, 1.0])
def test_occlusion_covers_half_its_amount(amount: float, picture: Picture) -> None:
    hidden = (apply("occlusion", picture, amount) != picture).any(axis=2).mean()
    assert hidden == pytest.approx(amount / 2, abs=0.03)


def test_noise_darkness_and_blur_by_amount() -> None:
    grey = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    assert apply("noise", grey, 0.5).astype(float).std() == pytest.approx(20, rel=0.03)
    light = [apply("darkness", grey, amount).astype(float).mean() for amount in (0, 0.3, 0.6, 1)]
    assert light == sorted(light, reverse=True) and light[-1] < 0.15 * light[0]
    edge = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    edge[:, WIDTH // 2 :] = 200
    profile = np.diff(apply("blur", edge, 1.0)[60, :, 0].astype(float))
    spread = math.sqrt((profile * (np.arange(len(profile)) - profile.argmax()) ** 2).sum() / profile.sum())
    assert spread == pytest.approx(4 * WIDTH / 640, abs=0.3)


def test_jpeg_loses_more_with_its_amount(picture: Picture) -> None:
    losses = [np.abs(apply("jpeg", picture, amount).astype(int) - picture).mean() for amount in (0.2, 0.6, 1)]
    assert losses == sorted(losses)


def test_training_takes_the_named_changes_alone(picture: Picture) -> None:
    versions = [changed(picture, (noise,), np.random.default_rng(seed)) for seed in range(40)]
    untouched = sum(np.array_equal(version, picture) for version in versions)
    assert 15 <= untouched <= 35  # a chance of 0.35 to change
    assert all(math.dist(dot(version), dot(picture)) < 1 for version in versions[:10] if version.mean() > 0)
    np.testing.assert_array_equal(changed(picture, (), np.random.default_rng(0)), picture)


@pytest.mark.parametrize("seed", range(12))
def test_what_moves_pixels_is_known(seed: int, picture: Picture) -> None:
    moves = (turn, roll, zoom)
    homography = changed_view(moves, np.random.default_rng(seed), WIDTH, HEIGHT)
    version = changed(picture, moves, np.random.default_rng(seed))
    x, y = moved(homography, *dot(picture))
    if 0 <= x <= WIDTH - 1 and 0 <= y <= HEIGHT - 1:
        (from_x, from_y), to_x, to_y = map(round, dot(picture)), round(x), round(y)
        assert np.abs(version[to_y, to_x].astype(int) - picture[from_y, from_x]).max() < 30
    if np.array_equal(homography, np.eye(3)):
        assert math.dist(dot(version), dot(picture)) < 1


def test_some_views_move_and_some_stay() -> None:
    views = [changed_view((turn, noise), np.random.default_rng(seed), WIDTH, HEIGHT) for seed in range(40)]
    assert 5 <= sum(not np.array_equal(view, np.eye(3)) for view in views) <= 25
    assert np.array_equal(changed_view((noise,), np.random.default_rng(0), WIDTH, HEIGHT), np.eye(3))


def test_changes_of_a_configuration_are_in_the_order_of_the_table() -> None:
    assert TrainConfig(augmentation=("jpeg", "roll")).changes == (roll, jpeg)
    with pytest.raises(UserError, match=r"\[train\] augmentation = fog: expected one of turn, roll"):
        CHANGES.find("fog")
