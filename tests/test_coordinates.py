"""UTM against positions whose coordinates are known, and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchnetvlad.csv_table import check_geographic
from patchnetvlad.errors import UserError
from patchnetvlad.localization.coordinates import (
    Zone,
    band_zone,
    common_zone,
    in_one_zone,
    outside_zone,
    parse_zone,
    to_geographic,
    to_utm,
)

TOWER = np.array([[43.642567, -79.387139]])  # CN Tower, Toronto: 17N 630084 4833438
CAPE = np.array([[-34.357203, 18.497440]])  # Cape of Good Hope lies in 34S


def test_known_positions():
    assert common_zone(TOWER) == Zone(17) and common_zone(CAPE) == Zone(34, south=True)
    assert to_utm(TOWER, Zone(17))[0] == pytest.approx([630084, 4833438], abs=1)
    east, north = to_utm(CAPE, Zone(34, south=True))[0]
    assert 200_000 < east < 300_000 and north == pytest.approx(10_000_000 - 34.357203 * 110_900, abs=20_000)
    assert to_utm(np.array([[0.0, 3.0]]), Zone(31))[0] == pytest.approx([500_000, 0], abs=1e-6)


@settings(deadline=None)
@given(st.floats(-80, 84), st.floats(-180, 179.99))
def test_there_and_back(latitude, longitude):
    position = np.array([[latitude, longitude]])
    zone = common_zone(position)
    away = (to_geographic(to_utm(position, zone), zone) - position)[0]
    assert away[0] == pytest.approx(0, abs=1e-8)
    assert (away[1] + 180) % 360 - 180 == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    "first, second",
    [((50.0, 5.999), (50.0, 6.001)), ((0.001, 100.0), (-0.001, 100.0)), ((-17.0, 179.999), (-17.0, -179.999))],
)
def test_distances_across_zones_the_equator_and_the_180th_meridian(first, second):
    positions = np.array([first, second])
    zone = common_zone(positions)
    metres = np.linalg.norm(np.diff(to_utm(positions, zone), axis=0))
    degrees = np.abs(positions[0] - positions[1])
    degrees[1] = min(degrees[1], 360 - degrees[1])
    expected = np.hypot(degrees[0] * 110_574, degrees[1] * 111_320 * np.cos(np.radians(first[0])))
    assert metres == pytest.approx(expected, rel=5e-3)


def test_neighbours_are_counted_and_converted():
    positions = np.array([[50.0, 5.99], [50.0, 6.01], [50.0, 6.02]])
    assert common_zone(positions) == Zone(32) and outside_zone(positions, Zone(32)) == 1
    mixed = np.concatenate([to_utm(positions[:1], Zone(31)), to_utm(positions[1:], Zone(32))])
    one, zone, moved = in_one_zone(mixed, [Zone(31), Zone(32), Zone(32)])
    assert (zone, moved) == (Zone(32), 1)
    assert one == pytest.approx(to_utm(positions, Zone(32)), abs=1e-3)


def test_zones_in_words():
    assert [str(parse_zone(text, "x")) for text in ("17N", " 17 s ", "54K", "33T")] == ["17N", "17S", "54S", "33N"]
    assert band_zone(17, "S", "x") == Zone(17) and band_zone(34, "H", "x") == Zone(34, south=True)
    for text in ("0N", "61N", "17", "N17", "17I", ""):
        with pytest.raises(UserError, match="expected a number 1 to 60"):
            parse_zone(text, "x")
    with pytest.raises(UserError, match="band C to X"):
        band_zone(17, "I", "x")


def test_positions_that_cannot_be():
    with pytest.raises(UserError, match=r"1 of 1 positions are out of range.*swapped.*a.jpg \(139.7, 35.6\)"):
        check_geographic(np.array([[139.7, 35.6]]), ["a.jpg"], "x")
    with pytest.raises(UserError, match=r"2 of 2.*no position"):
        check_geographic(np.array([[np.nan, 35.6], [139.0, 181.0]]), ["a.jpg", "b.jpg"], "x")
    with pytest.raises(UserError, match="are 0, 0"):
        check_geographic(np.zeros((7, 2)), list("abcdefg"), "x")
    with pytest.raises(UserError, match="1 of 2 positions are more than 20°"):
        to_utm(np.array([[50.0, 6.0], [6.0, 50.0]]), Zone(32))
