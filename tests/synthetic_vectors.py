"""Vector files of given features in each format that is read, and the plain way to tell which pixels lie in a polygon."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
from numpy.typing import NDArray

from modalities.grid import Grid

Feature = tuple[dict[str, Any], dict[str, Any]]
"""A geometry of GeoJSON and its attributes."""

ENDINGS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".shp": "ESRI Shapefile"}


def polygon(*rings: Any) -> dict[str, Any]:
    """A polygon of an outline and holes, each closed here."""
    closed = [[*(list(map(float, corner)) for corner in ring), list(map(float, ring[0]))] for ring in rings]
    return {"type": "Polygon", "coordinates": closed}


def box(west: float, south: float, east: float, north: float) -> dict[str, Any]:
    return polygon([(west, south), (east, south), (east, north), (west, north)])


def point(x: float, y: float) -> dict[str, Any]:
    return {"type": "Point", "coordinates": [float(x), float(y)]}


def write_features(path: Path, features: Sequence[Feature], crs: str | None = "EPSG:32633", layer: str | None = None) -> Path:
    """A vector file; one more layer of a GeoPackage where `layer` is given. `crs=None` leaves the CRS out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = [{"type": "Feature", "geometry": geometry, "properties": properties} for geometry, properties in features]
    named = {"crs": {"type": "name", "properties": {"name": f"urn:ogc:def:crs:{crs.replace(':', '::')}"}}} if crs else {}
    text = json.dumps({"type": "FeatureCollection", **named, "features": members})
    if path.suffix in (".geojson", ".json"):
        path.write_text(text)
        return path
    plain = path.with_name(f"{path.stem}-source.geojson")
    plain.write_text(text)
    meta, _, geometries, columns = pyogrio.raw.read(plain)
    plain.unlink()
    fields, kind = [str(name) for name in meta["fields"]], meta["geometry_type"]
    more = {"layer": layer, "append": path.exists()} if layer else {}
    pyogrio.raw.write(path, geometries, columns, fields, geometry_type=kind, crs=crs or "EPSG:32633", driver=ENDINGS[path.suffix], **more)
    if path.suffix == ".shp" and crs is None:
        path.with_suffix(".prj").unlink(missing_ok=True)
    return path


def centres(grid: Grid) -> NDArray[np.float64]:
    """x and y `(2, row, column)` of the pixel centres of a grid."""
    rows, columns = np.mgrid[: grid.space[0], : grid.space[1]]
    found: NDArray[np.float64] = np.tensordot(grid.matrix[:2, :2], np.stack([rows, columns]), 1) + grid.matrix[:2, 2:, None]
    return found


def inside(geometry: dict[str, Any], xy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Places that lie in a polygon of GeoJSON, by counting the edges west of each."""
    odd = np.zeros(xy.shape[1:], dtype=bool)
    polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    for rings in polygons:
        for ring in rings:
            for (x0, y0), (x1, y1) in pairwise(ring):
                if y0 == y1:
                    continue
                crosses = (np.minimum(y0, y1) <= xy[1]) & (xy[1] < np.maximum(y0, y1))
                odd ^= crosses & (x0 + (xy[1] - y0) / (y1 - y0) * (x1 - x0) < xy[0])
    return odd
