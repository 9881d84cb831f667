"""Latitude and longitude to metres and back: UTM, one zone for a whole dataset."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

from patchnetvlad.errors import UserError

FARTHEST = 20.0  # degrees of longitude from a zone's meridian; there distances are 6 % too long at the equator


@dataclass(frozen=True)
class Zone:
    """A UTM zone: number 1..60, and whether northings count from 10,000 km south of the equator."""

    number: int
    south: bool = False

    def __str__(self) -> str:
        return f"{self.number}{'S' if self.south else 'N'}"

    @property
    def epsg(self) -> int:
        """Code of the zone on WGS 84."""
        return (32700 if self.south else 32600) + self.number

    @property
    def meridian(self) -> float:
        """Longitude of the zone's middle in degrees."""
        return 6.0 * self.number - 183.0


def parse_zone(text: str, where: str) -> Zone:
    """Read a zone: 17N and 17S are hemispheres, as is a number after them; other letters are latitude bands (17T).

    The letter S is taken as the southern hemisphere: band S (32° to 40° north) must be given as N.
    Raises UserError, naming where the text came from.
    """
    match = re.fullmatch(r"\s*(\d{1,2})\s*([C-HJ-NP-Xc-hj-np-x])\s*", text)
    if not match or not 1 <= int(match[1]) <= 60:
        raise UserError(f"{where}: UTM zone {text!r}: expected a number 1 to 60 and N or S, such as 17N")
    letter = match[2].upper()
    return Zone(int(match[1]), letter < "N" or letter == "S")


def band_zone(number: int, band: str, where: str) -> Zone:
    """A zone from its number and its latitude band, C to X, in which N to X are north."""
    letter = band.strip().upper()
    if len(letter) != 1 or letter not in "CDEFGHJKLMNPQRSTUVWX" or not 1 <= number <= 60:
        raise UserError(f"{where}: UTM zone {number}{band}: expected a number 1 to 60 and a band C to X")
    return Zone(number, letter < "N")


def common_zone(geographic: NDArray[np.float64]) -> Zone:
    """The zone in which most of the positions N×2 (latitude, longitude) lie."""
    numbers = _zone_numbers(geographic)
    number = Counter(numbers.tolist()).most_common(1)[0][0]
    return Zone(number, bool(np.median(geographic[:, 0]) < 0))


def outside_zone(geographic: NDArray[np.float64], zone: Zone) -> int:
    """How many positions have another zone of their own."""
    return int((_zone_numbers(geographic) != zone.number).sum())


def to_utm(geographic: NDArray[np.float64], zone: Zone) -> NDArray[np.float64]:
    """Latitude and longitude N×2 in degrees to easting and northing N×2 in metres of one zone.

    Positions beyond the zone's edges, the equator and the 180th meridian are continued in it, so that distances stay
    what they are (to 0.5 % within 6° of longitude from its middle). Raises UserError for a position too far from it.
    """
    away = np.abs((geographic[:, 1] - zone.meridian + 180.0) % 360.0 - 180.0)
    if len(away) and away.max() > FARTHEST:
        raise UserError(
            f"UTM zone {zone}: {int((away > FARTHEST).sum())} of {len(away)} positions are more than {FARTHEST:g}° of "
            "longitude from its middle: one zone cannot hold them (latitude and longitude swapped in some rows, or "
            "several places: make a dataset of each)"
        )
    east, north = _transformer(zone).transform(geographic[:, 0], geographic[:, 1])
    return np.stack([np.asarray(east, np.float64), np.asarray(north, np.float64)], axis=1)


def to_geographic(utm: NDArray[np.float64], zone: Zone) -> NDArray[np.float64]:
    """Easting and northing N×2 in metres to latitude and longitude N×2 in degrees."""
    latitude, longitude = _transformer(zone).transform(utm[:, 0], utm[:, 1], direction="INVERSE")
    return np.stack([np.asarray(latitude, np.float64), np.asarray(longitude, np.float64)], axis=1)


def in_one_zone(
    utm: NDArray[np.float64], zones: Sequence[Zone], common: Zone | None = None
) -> tuple[NDArray[np.float64], Zone, int]:
    """Positions N×2 of several zones in one, the most frequent unless given; that zone, how many were converted."""
    chosen = common or Counter(zones).most_common(1)[0][0]
    result = utm.copy()
    for zone in set(zones) - {chosen}:
        rows = np.array([other == zone for other in zones])
        result[rows] = to_utm(to_geographic(utm[rows], zone), chosen)
    return result, chosen, sum(zone != chosen for zone in zones)


def look_swapped(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether two sets of latitudes and longitudes are far apart, and near each other once one set is swapped."""
    a, b = np.median(first, axis=0), np.median(second, axis=0)
    return bool(np.abs(a - b).max() > 1 and np.abs(a - b[::-1]).max() < 1)


def _zone_numbers(geographic: NDArray[np.float64]) -> NDArray[np.int64]:
    return ((geographic[:, 1] + 180.0) // 6.0).astype(np.int64) % 60 + 1


def _transformer(zone: Zone) -> Transformer:
    return Transformer.from_crs(4326, zone.epsg)
