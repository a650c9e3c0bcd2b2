"""Scenes from GeoTIFF, COG and JPEG 2000: one multi-band file, or one file a band on grids of several resolutions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from modalities import archive
from modalities.class_band import ClassBand, MaskFile, plain_folder
from modalities.cog import Layout, RasterBand, write_raster
from modalities.grid import Grid, Window
from modalities.label_raster import check_window, open_raster_labels
from modalities.place import name_apart
from modalities.quality import Quality
from modalities.raster_bands import DescribedBand, TimeSource, check_names, choose
from modalities.raster_file import BROKEN, BandFile, RasterFile, inspect, opened, plain, read_bands, same_frame, usable
from modalities.resample import Resampling, align, bilinear, footprint, is_placed, repeated
from modalities.scene import AdapterSettings, Channel, LabelMap, Rejected, SceneError, matches


class Radiometry(AdapterSettings):
    """Physical value = stored value · `scale` + `offset` for files whose relative path or name matches the glob."""

    match: str
    scale: float = 1.0
    offset: float = 0.0


class RasterSettings(AdapterSettings):
    """How to read multi-band rasters.

    Attributes:
        bands: Names by position, for files whose bands are not all described; without it these are `band_1`, `band_2`, …. Or entries
            that say more (`{name: ETM_B1, position: 1, wavelength_nm: 485, unit: reflectance, scale: 0.004}`), which count for every
            file and choose the channels and their order.
        radiometry: Scale and offset by file; the first match wins, then what `bands` says, then what the file says itself, then 1 and 0.
        nodata: The value that means "nothing here", in place of the file's own.
        time: Where a file's time of acquisition stands.
        exclude: Globs of relative paths or file names that are not looked at.
        require_georeference: Reject files without a CRS or an affine.
        clouds: A file beside every image that says which of its pixels are bad.
    """

    kind: Literal["raster"] = "raster"
    bands: tuple[str | DescribedBand, ...] | None = Field(None, min_length=1)
    radiometry: tuple[Radiometry, ...] = ()
    nodata: float | None = None
    time: TimeSource | None = None
    exclude: tuple[str, ...] = ()
    require_georeference: bool = False
    clouds: MaskFile | None = None

    @field_validator("bands")
    @classmethod
    def _unique(cls, bands: tuple[str | DescribedBand, ...] | None) -> tuple[str | DescribedBand, ...] | None:
        check_names(bands or ())
        return bands


def radiometry(
    file: RasterFile, position: int, chosen: tuple[Radiometry, ...], default: tuple[float, float] = (1.0, 0.0)
) -> tuple[float, float]:
    """Scale and offset of the data band at `position`: the first match of `chosen`, else the file's tags, else `default`.

    Raises:
        SceneError: The tags count, and are no numbers to reckon with.
    """
    for entry in chosen:
        if matches(file.relative, entry.match):
            return entry.scale, entry.offset
    own = usable(file.scales[position], file.offsets[position])
    return default if own == (1.0, 0.0) else own


@dataclass(frozen=True)
class RasterScene:
    """Bands in one or several files, on the grid of the finest of them.

    Bands on a coarser grid are brought to it by position: `bilinear` between valid pixels, or `native`, each measurement
    repeated over the voxels that it covers (`Channel.footprint` of them along an axis). A pixel is flagged when ANY
    of the bands is invalid there, so that a mixed scene is only counted where all of its bands measured something;
    the flags say why: `NODATA` (the nodata value or a mask or alpha band of the file), `NOT_FINITE`, `SATURATED`
    (only where the adapter knows the value), `OUTSIDE` (a coarser band does not reach there), and what the maps of classes
    beside the bands say (`CLOUD`, `EXCLUDED` around clouds). `documents` are metadata files that the scene was read by.
    """

    name: str
    group: str
    grid: Grid
    bands: tuple[BandFile, ...]
    times: tuple[str, ...] = ()
    class_bands: tuple[ClassBand, ...] = ()
    resampling: Resampling = "bilinear"
    documents: tuple[Path, ...] = ()
    label_suffix: str = field(default=".tif", init=False)
    voxel_digests: tuple[str, ...] = field(default=(), init=False)
    patients: tuple[str, ...] = field(default=(), init=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the bands, each once, then those of the maps of classes and the metadata; a zip stands for its members."""
        return tuple(dict.fromkeys(archive.on_disk(path) for path in (*(band.path for band in self._all_bands), *self.documents)))

    @property
    def _all_bands(self) -> tuple[BandFile, ...]:
        return (*self.bands, *(classes.band for classes in self.class_bands))

    @property
    def channels(self) -> tuple[Channel, ...]:
        """One per band."""
        return tuple(band.channel for band in self.bands)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The narrowest type that holds all bands; float64 becomes float32."""
        common = np.result_type(*(np.dtype(band.dtype) for band in self.bands))
        return np.dtype(np.float32) if common == np.float64 else common

    @property
    def block(self) -> tuple[int, ...]:
        """The largest block of the bands' files, brought to the scene's grid; a strip is as wide as its file."""
        steps = [np.divide(band.grid.spacing, self.grid.spacing) for band in self._all_bands]
        sizes = np.max([np.rint(band.block * step) for band, step in zip(self._all_bands, steps, strict=True)], axis=0)
        return tuple(int(min(max(size, 1), whole)) for size, whole in zip(sizes, self.grid.space, strict=True))

    @property
    def reference(self) -> BandFile:
        """The first band that lies on the scene's own grid."""
        return next(band for band in self.bands if band.grid == self.grid)

    def read(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        """Pixels `(channel, row, column)` and quality `(row, column)`; any window gives the numbers of the whole."""
        check_window(window, self.grid, self.name)
        space = tuple(part.stop - part.start for part in window)
        pixels = np.empty((len(self.bands), *space), self.dtype)
        quality = np.zeros(space, np.uint8)
        brought = bilinear if self.resampling == "bilinear" else repeated
        for path in dict.fromkeys(band.path for band in self.bands):
            places = [i for i, band in enumerate(self.bands) if band.path == path]
            bands = [self.bands[i] for i in places]
            rows, columns = align(self.grid, bands[0].grid)
            source = (rows.needed(window[0]), columns.needed(window[1]))
            values, flags = read_bands(bands, source)
            for place, band_values, band_flags in zip(places, values, flags, strict=True):
                new_values, new_flags = brought(band_values, band_flags, (rows, columns), window)
                with np.errstate(over="ignore"):
                    pixels[place] = new_values
                if pixels.dtype.kind == "f":
                    new_flags |= np.where(np.isfinite(pixels[place]) | (new_flags > 0), np.uint8(0), np.uint8(Quality.NOT_FINITE))
                quality |= new_flags
        for classes in self.class_bands:
            quality |= classes.read(self.grid, window)
        return pixels, quality

    def open_labels(self, path: Path) -> LabelMap:
        """The class numbers in a single-band raster; from another lattice or CRS the nearest, as `labels.match_labels` tells."""
        return open_raster_labels(path, self.grid, self.name)[0]

    def write_labels(self, path: Path, labels: NDArray[np.uint8], no_label: int) -> None:
        """A COG with the CRS and the very affine of the reference band's file."""
        if labels.shape != self.grid.space or labels.dtype != np.uint8 or not 0 <= no_label <= 255:
            raise SceneError(
                f"labels for {self.name} must be uint8 of shape {self.grid.space} with no_label in 0…255, "
                f"got {labels.dtype} of shape {labels.shape} with {no_label}"
            )
        layout = Layout((labels.shape[0], labels.shape[1]), self.place(), (RasterBand("class"),), "uint8", no_label, overviews="nearest")
        write_raster(path, layout, labels[None])

    def place(self) -> dict[str, Any]:
        """CRS and the very affine of the reference band's file, as rasterio wants them; empty where the scene has no place."""
        path = self.reference.path
        try:
            with opened(path) as source:
                return {"crs": source.crs, "transform": source.transform} if is_placed(self.grid) else {}
        except BROKEN as error:
            raise SceneError(f"cannot read {path}, whose geometry the labels of {self.name} take: {plain(error, path)}") from error


def scan_rasters(files: Iterable[Path], folder: Path, settings: RasterSettings) -> tuple[list[RasterScene], list[Rejected]]:
    """A scene for every usable raster and a reason for every other one.

    The header and the last block are read, which finds text under a false name, cut-off files and most damage.
    A damaged block elsewhere, or a damaged mask, is found when `read` comes to it. Files beside a raster (`.aux.xml`,
    `.tfw`, `.msk`, `.ovr`) are not looked at.
    """
    scenes: list[RasterScene] = []
    rejected: list[Rejected] = []
    images, masks = split_masks(files, settings.clouds)
    for path in images:
        relative = path.relative_to(folder).as_posix()
        try:
            scenes.append(_scene(inspect(path, relative), settings))
        except SceneError as error:
            rejected.append(Rejected(relative, str(error)))
    scenes, without = with_masks(scenes, masks, folder, settings.clouds)
    return name_apart(scenes, folder), rejected + without


def _scene(file: RasterFile, settings: RasterSettings) -> RasterScene:
    if settings.require_georeference and not (file.grid.frame and is_placed(file.grid)):
        points = f" but {file.num_gcps} ground control points; warp it by them (gdalwarp -tps)" if file.num_gcps else ""
        raise SceneError(f"it has no CRS and affine{points}, and reader.require_georeference=true")
    bands = []
    for i, said in choose(file, settings.bands):
        scale, offset = radiometry(file, i, (*settings.radiometry, *_said(file, i, said)))
        channel = Channel(said.name, said.wavelength_nm, said.resolution_m or file.resolution_m, scale, offset, said.unit, said.level)
        nodata = next((value for value in (said.nodata, settings.nodata) if value is not None), file.nodata[i])
        bands.append(BandFile(file.path, file.indexes[i], channel, file.grid, file.dtypes[i], nodata, said.saturated, block=file.block))
    name = Path(file.relative).with_suffix("").as_posix()
    return RasterScene(name, name, file.grid, tuple(bands), settings.time.read(file) if settings.time else ())


def _said(file: RasterFile, position: int, said: DescribedBand) -> list[Radiometry]:
    """What the description of a band says of its scale, for every file; nothing where it is silent."""
    if said.scale is None and said.offset is None:
        return []
    scale = file.scales[position] if said.scale is None else said.scale
    return [Radiometry(match="*", scale=scale, offset=file.offsets[position] if said.offset is None else said.offset)]


def assemble(name: str, bands: list[BandFile], resampling: Resampling = "bilinear") -> tuple[RasterScene, list[tuple[BandFile, str]]]:
    """The scene of several bands on the grid of the finest, and the bands that cannot be brought to it, with reasons.

    Where the files speak of several CRS, the one that most bands have is the scene's. With `native`, the footprints of
    the channels are set, and a band whose pixels do not each cover a whole block of the scene's grid is one that cannot be brought to it.
    """
    frame = Counter(band.grid.frame for band in bands).most_common(1)[0][0]
    reference = min((band for band in bands if band.grid.frame == frame), key=lambda band: float(np.prod(band.grid.spacing)))
    kept, left = [], []
    sides: dict[Grid, int | str] = {}
    for band in bands:
        if not same_frame(band.grid.frame, frame):
            own, wanted = band.grid.frame or "none", frame or "none"
            left.append((band, f"its CRS ({own}) is not that of the scene's other bands ({wanted}); warp it to theirs"))
            continue
        if band.grid not in sides:
            sides[band.grid] = _footprint_on(reference.grid, band.grid, resampling)
        side = sides[band.grid]
        if isinstance(side, str):
            left.append((band, side))
        else:
            kept.append(replace(band, channel=replace(band.channel, footprint=side)))
    return RasterScene(name, name, reference.grid, tuple(kept), resampling=resampling), left


def _footprint_on(grid: Grid, own: Grid, resampling: Resampling) -> int | str:
    """`Channel.footprint` of bands that lie on `own`; why they cannot be brought to `grid`."""
    try:
        rows, columns = align(grid, own)
        return footprint((rows, columns)) if resampling == "native" else 1
    except SceneError as error:
        return str(error)


def with_classes(scene: RasterScene, *class_bands: ClassBand) -> RasterScene:
    """The scene with these maps of classes beside those that it has.

    Raises:
        SceneError: A map lies in another CRS or on other ground. The message names it.
    """
    for classes in class_bands:
        if not same_frame(classes.band.grid.frame, scene.grid.frame):
            own, wanted = classes.band.grid.frame or "none", scene.grid.frame or "none"
            raise SceneError(
                f"the map of classes {classes.band.path.name} has the CRS {own}, its image {wanted}; warp it with nearest neighbour"
            )
        classes.align(scene.grid)
    return replace(scene, class_bands=(*scene.class_bands, *class_bands))


def split_masks(files: Iterable[Path], wanted: MaskFile | None) -> tuple[list[Path], list[Path]]:
    """The files that are images, and those that are a mask of another file."""
    found = sorted(files)
    names = _by_folder(found)
    masks = {path for file in found for path in wanted.beside(file, names)} if wanted else set()
    return [file for file in found if file not in masks], sorted(masks)


def with_masks(
    scenes: Iterable[RasterScene], masks: Iterable[Path], folder: Path, wanted: MaskFile | None
) -> tuple[list[RasterScene], list[Rejected]]:
    """The scenes, each with the mask beside its first file, and a reason for every file that is in none any more."""
    if wanted is None:
        return list(scenes), []
    names, used = _by_folder(masks), set[Path]()
    kept: list[RasterScene] = []
    rejected: list[Rejected] = []
    for scene in scenes:
        try:
            beside = _only(wanted.beside(scene.files[0], names), wanted)
            kept.append(with_classes(scene, *(wanted.band(_inspected(path, folder)) for path in beside)))
            used.update(beside)
        except SceneError as error:
            rejected += [Rejected(file.relative_to(folder).as_posix(), str(error)) for file in scene.files]
    rejected += [Rejected(path.relative_to(folder).as_posix(), "a mask of no scene") for path in sorted(set(masks) - used)]
    return kept, rejected


def _only(beside: list[Path], wanted: MaskFile) -> list[Path]:
    if len(beside) > 1:
        raise SceneError(
            f"{len(beside)} files fit {wanted.file} ({', '.join(path.name for path in beside)}); name one in reader.clouds.file"
        )
    if not beside and wanted.required:
        raise SceneError(f"there is no mask {wanted.file} of it; set reader.clouds.required=false to use it without")
    return beside


def _by_folder(files: Iterable[Path]) -> dict[str, dict[str, Path]]:
    found: defaultdict[str, dict[str, Path]] = defaultdict(dict)
    for file in files:
        found[plain_folder(file.parent)][file.name] = file
    return found


def _inspected(path: Path, folder: Path) -> RasterFile:
    try:
        return inspect(path, path.relative_to(folder).as_posix(), colour_table=True)
    except SceneError as error:
        raise SceneError(f"its mask {path.name} cannot be used: {error}") from error
