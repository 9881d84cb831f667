"""The renderer's geometry is exact, its pictures obey it, and the shipped example pictures are what it makes."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from patchnetvlad.commands.examples import render_example_places
from patchnetvlad.examples.rendered_city import City, city_geometry, make_city
from patchnetvlad.examples.rendered_places import (
    Camera,
    Condition,
    Place,
    Size,
    facade_homography,
    facade_mask,
    render_place,
)
from patchnetvlad.ground_truth import read_ground_truth

ROOT = Path(__file__).parent.parent
SMALL = (160, 120)
FRONT = Camera()
ASIDE = Camera(x=6.0, distance=12.0, height=1.8, yaw=-24.0, pitch=5.0, field_of_view=66.0)


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])


@pytest.fixture(scope="module")
def place() -> Place:
    return Place(4, scale=16)


@pytest.fixture(scope="module")
def city() -> City:
    return make_city()


def test_camera_looks_along_its_axis() -> None:
    level = Camera(x=2.0, distance=10.0, height=1.5, yaw=0.0, pitch=0.0, field_of_view=90.0)
    pixels = level.project(np.array([[2, 0, 1.5], [3, 0, 1.5], [2, 0, 2.5], [2, 10, 2.5]]), (101, 81))
    focal = 50.5
    expected = [(50, 40), (50 + focal / 10, 40), (50, 40 - focal / 10), (50, 40 - focal / 20)]
    np.testing.assert_allclose(pixels, expected, atol=1e-9)


def test_positive_yaw_turns_right_and_positive_pitch_up() -> None:
    ahead = np.array([[0.0, 0.0, 1.6]])
    pixels = Camera(yaw=10, pitch=10).project(ahead, SMALL)[0]
    assert pixels[0] < SMALL[0] / 2
    assert pixels[1] > SMALL[1] / 2


@pytest.mark.parametrize("size_b", [None, (97, 131)])
def test_homography_carries_facade_points_between_views(size_b: Size | None) -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-6, 6, 50), np.zeros(50), rng.uniform(0, 9, 50)])
    homography = facade_homography(FRONT, ASIDE, SMALL, size_b)
    carried = cv2.perspectiveTransform(FRONT.project(points, SMALL)[None], homography)[0]
    np.testing.assert_allclose(carried, ASIDE.project(points, size_b or SMALL), atol=1e-6)


@pytest.mark.parametrize("size", [SMALL, (320, 240)])
@pytest.mark.parametrize("dusk", [0.0, 1.0])
def test_pictures_of_two_views_agree_by_the_homography(size: Size, dusk: float) -> None:
    place = Place(4, scale=size[0] / 10)
    condition = Condition(dusk=dusk, seed=5)
    first, second = (np.asarray(render_place(place, camera, condition, size)) for camera in (FRONT, ASIDE))
    seen = [facade_mask(place, camera, condition, size).astype(np.uint8) for camera in (FRONT, ASIDE)]
    homography = facade_homography(FRONT, ASIDE, size)
    warped = cv2.warpPerspective(first, homography, size)
    both = (cv2.warpPerspective(seen[0], homography, size) > 0) & (seen[1] > 0)
    assert both.mean() > 0.2
    agreement = correlation(warped[both], second[both])
    assert agreement > 0.9
    # Half a grid position off is visibly worse: the agreement is about geometry, not about colours.
    off = cv2.warpPerspective(first, np.array([[1.0, 0, 4], [0, 1, 4], [0, 0, 1]]) @ homography, size)
    assert correlation(off[both], second[both]) < agreement - 0.1


def test_same_arguments_same_picture(place: Place) -> None:
    condition = Condition(dusk=1.0, occluders=3, noise=3.0, blur=0.5, seed=8)
    first = render_place(place, ASIDE, condition, SMALL)
    again = render_place(Place(4, scale=16), ASIDE, condition, SMALL)
    assert first.size == SMALL
    assert first.mode == "RGB"
    np.testing.assert_array_equal(first, again)
    other = render_place(Place(5, scale=16), ASIDE, condition, SMALL)
    assert correlation(np.asarray(first), np.asarray(other)) < 0.9


def test_dusk_is_darker_and_bluer(place: Place) -> None:
    day, dusk = (np.asarray(render_place(place, FRONT, Condition(dusk=d), SMALL)).mean((0, 1)) for d in (0, 1))
    assert dusk.sum() < 0.6 * day.sum()
    assert dusk[2] / dusk[0] > day[2] / day[0]


def test_occluders_hide_part_of_the_facade(place: Place) -> None:
    free = facade_mask(place, FRONT, Condition(), SMALL)
    for seed in range(4):
        hidden = facade_mask(place, FRONT, Condition(occluders=3, seed=seed), SMALL)
        assert not (hidden & ~free).any()
        assert 0.3 * free.sum() < hidden.sum() < free.sum()


def test_look_alikes_share_walls_and_differ_in_signs() -> None:
    original, double = Place(1, style=1, scale=16), Place(7, style=1, scale=16)
    assert original.facade == double.facade
    a, b = (np.asarray(render_place(p, FRONT, None, SMALL)) for p in (original, double))
    upper, lower = slice(20, 50), slice(60, 90)
    assert correlation(a[upper, 40:120], b[upper, 40:120]) > 0.6
    assert correlation(a[lower, 40:120], b[lower, 40:120]) < 0.6


def test_city_has_the_views_asked_for() -> None:
    small = make_city(places=64, database_views=(2,), query_views=(1,), seed=3, look_alikes=4, scale=16)
    assert (len(small.places), len(small.database), len(small.queries)) == (64, 128, 64)
    assert [p.style for p in small.places[-4:]] == [p.style for p in small.places[:4]]
    assert len({p.seed for p in small.places}) == 64
    assert make_city(places=64, seed=3).queries != small.queries


def test_positions_within_the_radius_are_the_same_place(city: City) -> None:
    for query in city.queries:
        for view in city.database:
            near = np.hypot(query.east - view.east, query.north - view.north) <= 25
            assert near == (query.place == view.place)


def test_database_views_of_a_place_are_at_most_8_m_apart_along_the_street(city: City) -> None:
    for number in range(len(city.places)):
        along = [view.camera.x for view in city.database if view.place == number]
        assert np.ptp(along) <= 8


def test_shipped_lists_and_ground_truth_are_the_citys(city: City) -> None:
    for kind, views in (("index", city.database), ("query", city.queries)):
        names = (ROOT / f"dataset_imagenames/example_imageNames_{kind}.txt").read_text("utf-8").split()
        assert names == [view.name for view in views]
        assert all((ROOT / "example_images" / name).is_file() for name in names)
    with np.load(ROOT / "dataset_gt_files/example.npz") as truth:
        assert truth["posDistThr"] == 25
        np.testing.assert_allclose(truth["utmQ"], [(v.east, v.north) for v in city.queries], atol=1e-6)
        np.testing.assert_allclose(truth["utmDb"], [(v.east, v.north) for v in city.database], atol=1e-6)


def test_shipped_geometry_is_the_citys(city: City) -> None:
    shipped = json.loads((ROOT / "example_images/geometry.json").read_text("utf-8"))
    # Drawing the places is not needed for the homographies.
    pairs = {(pair["query"], pair["database"]): np.array(pair["homography"]) for pair in shipped["pairs"]}
    for query in city.queries:
        for view in city.database:
            assert ((query.name, view.name) in pairs) == (query.place == view.place)
    query, view = city.queries[0], city.database[0]
    expected = facade_homography(view.camera, query.camera, tuple(shipped["size"]))
    np.testing.assert_allclose(pairs[query.name, view.name], expected, rtol=1e-9)
    corners = np.array([shipped["pictures"][v.name]["facade"] for v in (view, query)])
    np.testing.assert_allclose(cv2.perspectiveTransform(corners[:1], expected)[0], corners[1], atol=0.1)


def test_geometry_of_a_city_is_plain_json() -> None:
    small = make_city(places=2, look_alikes=0, scale=8)
    geometry = json.loads(json.dumps(city_geometry(small, SMALL)))
    assert geometry["size"] == [160, 120]
    assert set(geometry["pictures"]) == {view.name for view in (*small.database, *small.queries)}


def test_shipped_picture_is_what_the_renderer_makes(city: City) -> None:
    view = city.queries[1]
    with Image.open(ROOT / "example_images" / view.name) as file:
        shipped = np.asarray(file.convert("RGB")).astype(float)
    rendered = np.asarray(city.render(view)).astype(float)
    assert shipped.shape == rendered.shape == (480, 640, 3)
    assert np.abs(shipped - rendered).mean() < 5
    assert correlation(shipped, rendered) > 0.98


def test_command_writes_a_set_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--width", "96", "--height", "72", "-q"]
    assert render_example_places(["--root", str(tmp_path), "--name", "tiny", "--places", "2", *size]) == 0
    assert capsys.readouterr().out == f"5 database pictures and 3 queries in {tmp_path / 'tiny_images'}\n"
    counts = {}
    for kind in ("index", "query"):
        names = (tmp_path / f"dataset_imagenames/tiny_imageNames_{kind}.txt").read_text("utf-8").split()
        counts[kind] = len(names)
        for name in names:
            with Image.open(tmp_path / "tiny_images" / name) as picture:
                assert picture.size == (96, 72)
    truth = read_ground_truth(tmp_path / "dataset_gt_files/tiny.npz", counts["query"], counts["index"])
    assert truth.radius == 25 and all(map(len, truth.positives()))
    assert set(json.loads((tmp_path / "tiny_images/geometry.json").read_text())) == {"size", "pictures", "pairs"}


@pytest.mark.parametrize("wrong", [["--width", "8"], ["--quality", "0"], ["--places", "0"], ["--seed", "-1"]])
def test_command_refuses_what_cannot_be_drawn(tmp_path: Path, wrong: list[str]) -> None:
    assert render_example_places(["--root", str(tmp_path), *wrong]) == 2
    assert not list(tmp_path.iterdir())


def test_example_pictures_are_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "example_images").rglob("*") if path.is_file()]
    assert sum(sizes) <= 3 * 2**20
