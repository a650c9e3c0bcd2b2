"""What classes are called and how they are coloured, as far as a label raster says it: colour table, category names, attribute table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from modalities.raster_file import BROKEN, opened, plain
from modalities.scene import SceneError

MAX_SIDECAR_BYTES = 1 << 24
NAME, LEAST, VALUE, RED, GREEN, BLUE = 2, 3, 5, 6, 7, 8
"""Uses of a column of GDAL's raster attribute table (GDALRATFieldUsage): a class is told by its one value or the least of a range."""

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class ClassTable:
    """Names and colours by class number, as far as they are known."""

    names: Mapping[int, str] = field(default_factory=dict)
    colours: Mapping[int, Rgb] = field(default_factory=dict)

    def only(self, values: Iterable[int]) -> ClassTable:
        """What is known of some classes."""
        kept = set(values)
        return ClassTable(
            {value: name for value, name in self.names.items() if value in kept},
            {value: colour for value, colour in self.colours.items() if value in kept},
        )


def raster_classes(path: Path) -> ClassTable:
    """Names and colours in a label raster and the `.aux.xml` beside it, which GDAL is kept from reading by itself.

    Raises:
        SceneError: One of them is damaged.
    """
    try:
        with opened(path) as source:
            try:
                table: dict[int, tuple[int, ...]] = source.colormap(1)
            except ValueError:  # rasterio's word for "it has none"
                table = {}
    except BROKEN as error:
        raise SceneError(f"the colour table of {path} cannot be read: {plain(error, path)}") from error
    colours = {value: (entry[0], entry[1], entry[2]) for value, entry in table.items()}
    sidecar = path.with_name(path.name + ".aux.xml")
    if not sidecar.is_file():
        return ClassTable({}, colours)
    beside = read_sidecar(sidecar)
    return ClassTable(beside.names, {**colours, **beside.colours})


def read_sidecar(path: Path) -> ClassTable:
    """Names and colours of band 1 in GDAL's `.aux.xml`.

    Raises:
        SceneError: It is no such file.
    """
    try:
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise SceneError(f"{path} has {path.stat().st_size} bytes, more than a table of classes needs; move it away")
        root = parse(path, forbid_dtd=True).getroot()
        band = next((found for found in root.iter("PAMRasterBand") if found.get("band", "1") == "1"), None)
        if band is None:
            return ClassTable()
        names = {value: (entry.text or "").strip() for value, entry in enumerate(band.findall("CategoryNames/Category"))}
        entries = enumerate(band.findall("ColorTable/Entry"))
        colours = {value: _rgb(entry.get(part, "0") for part in ("c1", "c2", "c3")) for value, entry in entries}
        table = band.find("GDALRasterAttributeTable")
        more = ClassTable() if table is None else _attribute_table(table)
    except (OSError, ParseError, DefusedXmlException, ValueError) as error:
        if isinstance(error, SceneError):
            raise
        raise SceneError(f"{path} is no table of classes that can be read ({error}); move it away, or write it anew") from error
    return ClassTable({value: name for value, name in {**names, **more.names}.items() if name}, {**colours, **more.colours})


def _attribute_table(table: Any) -> ClassTable:
    uses = {int(column.findtext("Usage", "0")): place for place, column in reversed(list(enumerate(table.findall("FieldDefn"))))}
    at = uses.get(VALUE, uses.get(LEAST))
    names: dict[int, str] = {}
    colours: dict[int, Rgb] = {}
    for number, row in enumerate(table.findall("Row")):
        cells = [(cell.text or "").strip() for cell in row.findall("F")]
        value = number if at is None else int(float(cells[at]))
        if NAME in uses:
            names[value] = cells[uses[NAME]]
        if {RED, GREEN, BLUE} <= uses.keys():
            colours[value] = _rgb(cells[uses[part]] for part in (RED, GREEN, BLUE))
    return ClassTable(names, colours)


def _rgb(parts: Iterable[str]) -> Rgb:
    red, green, blue = (int(float(part)) for part in parts)
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise ValueError(f"colour {red}, {green}, {blue} does not lie in 0…255")
    return red, green, blue
