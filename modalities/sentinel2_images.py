"""The files of a folder become Sentinel-2 images: products, STAC items, one file a band, or one file of many bands."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from modalities import archive
from modalities.product import Statement, from_names
from modalities.raster_file import BROKEN, ENDINGS, BandFile, RasterFile, holds_only, inspect, plain
from modalities.safe import METADATA, granule_of, is_image, product_of, read_product
from modalities.scene import Channel, Rejected, SceneError
from modalities.sentinel2_bands import BANDS, ORDERS, band_name, split_band, split_classes
from modalities.stac import Item, of_earth_engine, read_item, read_json

IMAGES = ENDINGS
COMPANIONS = (".zip", ".xml", ".json", ".geojson")
"""Endings of files that hold images, and of those that hold or describe them."""

_BY_RESOLUTION = re.compile(r"R(10|20|60)m")
_RESOLUTION = re.compile(r"_(10|20|60)m$")


@dataclass(frozen=True)
class Image:
    """Bands that belong together, wanted or not, and what is said of them.

    Attributes:
        name: Of the scene that it becomes.
        bands: Files of the bands with the scale and offset of their own tags, 1 and 0 without.
        statement: What metadata or names say.
        kind: A product, whose other files are known and need no reason; a STAC item; files joined by name; or one file of many bands.
        classes: File and position of the scene classification (SCL); None for none.
    """

    name: str
    bands: tuple[BandFile, ...]
    statement: Statement
    kind: Literal["product", "item", "joined", "stack"]
    classes: tuple[RasterFile, int] | None = None


@dataclass
class Gathering:
    """Images found so far, and the files that are in none.

    Attributes:
        folder: That is scanned.
        order: Names by position for a file whose bands have none.
    """

    folder: Path
    order: Callable[[str], tuple[str, ...] | None]
    images: list[Image] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def relative(self, path: Path) -> str:
        """The path as it is told."""
        return path.relative_to(self.folder).as_posix()

    def reject(self, path: Path, reason: str, *, unwanted: bool = False) -> None:
        """A file, or a member of a zip, cannot be used, or is not `unwanted`."""
        self.rejected.append(Rejected(self.relative(path), reason, unwanted))


def gather(files: Iterable[Path], folder: Path, order: Callable[[str], tuple[str, ...] | None]) -> Gathering:
    """All images of the files, with reasons for the image files, zips and metadata that are in none.

    A file that is in neither list is a companion: a preview, a mask or a coarser copy in a product, metadata of others.
    """
    found = Gathering(folder, order)
    paths = _unpacked(sorted(files), found)
    metadata = {path for path in paths if METADATA.fullmatch(path.name)}
    products: defaultdict[Path, list[Path]] = defaultdict(list)
    loose: list[Path] = []
    documents: list[Path] = []
    for path in paths:
        product = product_of(path, folder, metadata)
        if product:
            products[product].append(path)
        elif path.name.lower().endswith(IMAGES):
            loose.append(path)
        elif path.name.lower().endswith((".json", ".geojson")) and archive.split(path) is None:
            documents.append(path)
    for product, inside in products.items():
        _take_product(product, inside, metadata, found)
    taken, notes = _take_items(documents, loose, found)
    _take_loose([path for path in loose if path not in taken], notes, found)
    return found


def _unpacked(files: Iterable[Path], found: Gathering) -> list[Path]:
    paths: list[Path] = []
    for path in files:
        if not path.name.lower().endswith(".zip"):
            paths.append(path)
            continue
        try:
            inside = archive.members(path)
        except SceneError as error:
            found.reject(path, str(error))
            continue
        if not any(METADATA.fullmatch(member.name) for member in inside):
            found.reject(path, "it holds no Sentinel-2 product (no MTD_MSIL1C.xml, no MTD_MSIL2A.xml); unpack it if it holds images")
            continue
        paths += inside
    return paths


def _take_product(product: Path, files: list[Path], metadata: set[Path], found: Gathering) -> None:
    granules: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        if path.name.lower().endswith(IMAGES) and is_image(path, product):
            granules[granule_of(path, product)].append(path)
    documents = [path for path in files if METADATA.fullmatch(path.name)]
    try:
        statement = read_product(product, metadata)
    except SceneError as error:
        for path in [path for inside in granules.values() for path in inside] or documents or files[:1]:
            found.reject(path, str(error))
        return
    if not granules:
        found.reject(documents[0], "its product has no images under GRANULE/*/IMG_DATA; fetch the product anew")
    parts = [re.sub(r"(\.SAFE|\.zip)+$", "", part, flags=re.IGNORECASE) for part in product.relative_to(found.folder).parts]
    name = "/".join(dict.fromkeys(parts)) or re.sub(r"\.SAFE$", "", found.folder.resolve().name)
    for granule, inside in sorted(granules.items()):
        _take_granule(name if len(granules) == 1 else f"{name}/{granule}", inside, statement, found)


def _take_granule(name: str, files: list[Path], statement: Statement, found: Gathering) -> None:
    finest = _finest(files)
    bands = []
    for path, band in finest.items():
        try:
            bands.append(_band(inspect(path, found.relative(path)), 0, band))
        except SceneError as error:
            found.reject(path, str(error))
    classes = min((path for path in files if split_classes(path.stem) is not None), key=_resolution, default=None)
    special = [replace(band, nodata=statement.nodata, saturated=statement.saturated) for band in bands]
    if bands:
        found.images.append(Image(name, tuple(special), statement, "product", _classes(classes, found)))
    elif not finest:
        found.reject(files[0], "no image of its product has a band's name (…_B02.jp2, …_B02_10m.jp2)")


def _classes(path: Path | None, found: Gathering) -> tuple[RasterFile, int] | None:
    """The scene classification in a file of its own; None where there is none, or it is rejected."""
    if path is None:
        return None
    try:
        return inspect(path, found.relative(path), colour_table=True), 0
    except SceneError as error:
        found.reject(path, str(error))
        return None


def _finest(files: list[Path]) -> dict[Path, str]:
    """The file of the finest resolution for every band that the names speak of."""
    best: dict[str, Path] = {}
    for path in sorted(files):
        split = split_band(path.stem)
        if split:
            best[split[0]] = min(best.get(split[0], path), path, key=_resolution)
    return {path: band for band, path in best.items()}


def _resolution(path: Path) -> tuple[int, Path]:
    size = _RESOLUTION.search(path.stem)
    return int(size[1]) if size else 0, path


Notes = Mapping[Path, Mapping[str, Statement]]
"""What Earth Engine says beside the images of a folder, by the names of its files without ending."""


def _take_items(documents: list[Path], files: Iterable[Path], found: Gathering) -> tuple[set[Path], Notes]:
    """Files that are in images of STAC items, and what Earth Engine says of images."""
    free, taken = set(files), set[Path]()
    notes: defaultdict[Path, dict[str, Statement]] = defaultdict(dict)
    for path in documents:
        try:
            content = read_json(path)
            noted = of_earth_engine(content, path)
            if noted:
                notes[path.parent][path.stem] = noted
                continue
            item = read_item(content, path, found.folder, free)
        except SceneError as error:
            found.reject(path, str(error))
            continue
        if item:
            own = {*item.bands, *([item.scene_classes] if item.scene_classes else [])}
            taken |= own
            free -= own
            _take_item(item, found)
    return taken, notes


def _take_item(item: Item, found: Gathering) -> None:
    bands: list[BandFile] = []
    for path, band in item.bands.items():
        try:
            file = inspect(path, found.relative(path))
        except SceneError as error:
            found.reject(path, str(error))
            continue
        if file.count == 1:
            bands.append(_band(file, 0, band))
        else:
            found.reject(path, f"it has {file.count} bands where the item {item.path.name} says that it is {band}")
    kept = _one_each(bands, found)
    relative = found.relative(item.path)
    named = from_names(relative)
    statement = replace(item.statement, level=item.statement.level or named.level, time=item.statement.time or named.time)
    if kept:
        name = Path(relative).with_suffix("").as_posix()
        found.images.append(Image(name, kept, statement, "item", _classes(item.scene_classes, found)))


def _take_loose(files: Iterable[Path], notes: Notes, found: Gathering) -> None:
    joined: defaultdict[tuple[str, str], list[BandFile]] = defaultdict(list)
    maps: dict[tuple[str, str], Path] = {}
    for path in files:
        try:
            rest = split_classes(path.stem)
            if rest is not None:
                first = maps.setdefault((_place(path, found), rest), path)
                maps[_place(path, found), rest] = min(first, path, key=_resolution)
                continue
            file = inspect(path, found.relative(path))
            split = split_band(path.stem)
            validity = _validity(file) if split and file.count == 2 else None
            if split and (file.count == 1 or validity):
                joined[_place(path, found), split[1]].append(_band(file, 0, split[0], validity))
                continue
            found.images.append(_stack(file, _said(path, found.folder, notes), found))
        except SceneError as error:
            found.reject(path, str(error))
    for (place, rest), parts in sorted(joined.items()):
        name = "/".join(part for part in (place, rest) if part not in ("", ".")) or found.folder.resolve().name or "scene"
        classes = _classes(maps.pop((place, rest), None), found)
        found.images.append(Image(name, _one_each(parts, found), _said(parts[0].path, found.folder, notes), "joined", classes))
    for path in maps.values():
        found.reject(path, "it is a scene classification without bands beside it")


def _place(path: Path, found: Gathering) -> str:
    """The folder of a file, without the part that only says the resolution."""
    parent = path.parent.relative_to(found.folder)
    return (parent.parent if _BY_RESOLUTION.fullmatch(parent.name) else parent).as_posix()


def _stack(file: RasterFile, statement: Statement, found: Gathering) -> Image:
    names = _names(file, found.order(file.relative))
    bands = tuple(_band(file, i, name) for i, name in enumerate(names) if name)
    maps = [i for i, text in enumerate(file.descriptions) if split_classes(text) == ""]
    name = Path(file.relative).with_suffix("").as_posix()
    return Image(name, bands, statement, "stack", (file, maps[0]) if len(maps) == 1 else None)


def _said(path: Path, folder: Path, notes: Notes) -> Statement:
    """What Earth Engine and names say of an image; of several notes in a folder the one that is called like it counts."""
    named = from_names(path.relative_to(folder).as_posix())
    beside = notes.get(path.parent, {})
    split = split_band(path.stem)
    own = (beside[name] for name in (path.stem, split[1] if split else "") if name in beside)
    noted = next(own, next(iter(beside.values())) if len(beside) == 1 else None)
    return replace(noted, level=noted.level or named.level, time=noted.time or named.time) if noted else named


def _one_each(bands: list[BandFile], found: Gathering) -> tuple[BandFile, ...]:
    """The finest file of every band, in the order of the instrument; the others are rejected."""
    chosen: dict[str, BandFile] = {}
    for band in sorted(bands, key=lambda band: (float(np.prod(band.grid.spacing)), band.path)):
        first = chosen.setdefault(band.channel.name, band)
        if first is not band:
            finer = "" if first.grid.spacing == band.grid.spacing else ", which is finer"
            found.reject(band.path, f"band {band.channel.name} is read from {first.path.name}{finer}")
    return tuple(chosen[name] for name in BANDS if name in chosen)


def _band(file: RasterFile, position: int, name: str, validity_index: int | None = None) -> BandFile:
    channel = Channel(name, BANDS[name].wavelength_nm, BANDS[name].resolution_m, file.scales[position], file.offsets[position])
    nodata, dtype = file.nodata[position], file.dtypes[position]
    return BandFile(
        file.path,
        file.indexes[position],
        channel,
        file.grid,
        dtype,
        nodata=0.0 if nodata is None else nodata,
        saturated=65535.0 if dtype == "uint16" else None,
        validity_index=validity_index,
        block=file.block,
    )


def _validity(file: RasterFile) -> int | None:
    """Number of the file's second band if it holds nothing but 0 and 1."""
    try:
        return file.indexes[1] if holds_only(file.path, file.indexes[1], (0, 1)) else None
    except BROKEN as error:
        raise SceneError(f"its second band cannot be read ({plain(error, file.path)})") from error


def _names(file: RasterFile, by_position: tuple[str, ...] | None) -> tuple[str, ...]:
    """Band per position, empty for what is described as something else (a QA band).

    `Band 1`, `Band 2`, … counted up are what a writer puts where it knows no names, so they name nothing.
    """
    counted = [f"band{i + 1}" for i in range(file.count)]
    nothing = [re.sub(r"[ _-]", "", text.lower()) for text in file.descriptions] == counted
    found = [band_name(text) for text in file.descriptions]
    known = [band for band in found if band]
    if all(file.descriptions) and known and not nothing and len(set(known)) == len(known):
        return tuple(band or "" for band in found)
    if file.count == 1:
        raise SceneError("neither the end of its name nor its band's description says which Sentinel-2 band (B01 … B12) it is")
    if by_position is None:
        orders = " or ".join(f"reader.bands={name}" for name, order in ORDERS.items() if len(order) == file.count)
        raise SceneError(f"its {file.count} bands have no names: name them with {orders + ' or ' if orders else ''}reader.bands=[...]")
    if len(by_position) != file.count:
        raise SceneError(f"it has {file.count} bands where reader.bands names {len(by_position)} ({', '.join(by_position)})")
    return by_position
