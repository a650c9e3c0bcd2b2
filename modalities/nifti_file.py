"""The bytes of a NIfTI file: its checked header, its voxels, and a label file in the same geometry.

Nothing here knows of scenes. Errors give the reason without the file's name, which the caller adds where it may be seen.
Free text in headers (`descrip`, `db_name`, extensions) is never read into anything.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from modalities.grid import Grid
from modalities.scene import SceneError
from modalities.whole_file import written_whole

MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0
MAX_SHEAR = 0.02
"""Largest cosine between two axes of a volume, about 1 degree away from a right angle."""
MAX_DISAGREEMENT_MM = 1.0
"""A volume whose sform and qform put a corner further apart is flagged; the sform is used."""
MAX_PIXDIM_FRACTION = 0.01
"""A volume whose sform and pixdim have voxel sizes that differ by more than this share is flagged."""
LABEL_INTENT = 1002
"""What the numbers of a file are: NIFTI_INTENT_LABEL."""
MAX_TRAILING_BYTES = 1 << 20
MAX_GZIP_GAIN = 1032
"""Bytes that come out of one byte of gzip at most (zlib, technical details)."""

_QFORM = ("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_GEOMETRY = (*_QFORM, "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units")


@dataclass(frozen=True)
class VolumeHeader:
    """What the first bytes of a file say about its array.

    Attributes:
        space: Voxels per axis in the file's own order, of one volume.
        affine: Index in that order to RAS+ millimetres.
        dtype: As stored, byte order included.
        slope, intercept: Physical value = stored · slope + intercept.
        data_offset: Where the array begins in the uncompressed file.
        flags: What is doubtful: `orientation_unknown`, `sform_qform_disagree`, `sform_pixdim_disagree`, `bad_pixdim`, `sheared`.
        doubts: The same in words, one for each flag; empty where none were written.
        num_volumes: Volumes in the file, one behind the other.
    """

    space: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    dtype: str
    slope: float
    intercept: float
    data_offset: int
    flags: tuple[str, ...]
    doubts: tuple[str, ...] = ()
    num_volumes: int = 1

    @property
    def short(self) -> str:
        """The affine's upper rows with four digits, for a message."""
        return str(np.asarray(self.affine)[:3].round(4).tolist())

    @property
    def grid(self) -> Grid:
        """The lattice in the file's own order."""
        return Grid(self.space, self.affine, "RAS+", "mm")

    @property
    def orientation(self) -> str:
        """`LPS` where the index of the first axis grows to the left, that of the second to the back, that of the third upwards."""
        return "".join(nib.aff2axcodes(self.grid.matrix))

    @property
    def canonical(self) -> Grid:
        """The same lattice with each axis along the one of R, A and S that lies closest."""
        return _turned(self.grid, io_orientation(self.grid.matrix))

    def to_canonical(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """`values` in the order of `canonical`, from the file's."""
        return np.asarray(apply_orientation(values, io_orientation(self.grid.matrix)))

    def from_canonical(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """`values` in the file's order, from the order of `canonical`."""
        return np.asarray(apply_orientation(values, ornt_transform(axcodes2ornt("RAS"), io_orientation(self.grid.matrix))))

    def covers(self, other: VolumeHeader) -> bool:
        """Whether both speak of the same voxels, in whatever order: equal shape, affines equal within 0.001."""
        turned = _turned(self.grid, _turn(self, other))
        return turned.space == other.space and bool(np.allclose(turned.matrix, other.affine, rtol=0, atol=1e-3))

    def to_order_of(self, other: VolumeHeader, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """`values` in the order of `other`, which this one `covers`, from the file's."""
        return np.asarray(apply_orientation(values, _turn(self, other)))


def read_header(path: Path) -> VolumeHeader:
    """The checked header of a NIfTI file, plain or gzipped; no voxel is read.

    Raises:
        SceneError: It is no NIfTI header or describes no volume in space; without the file's name.
    """
    return _understand(_unpack_header(path))


def read_stored(path: Path, header: VolumeHeader, volumes: Sequence[int] = (0,)) -> NDArray[np.generic]:
    """The array as stored, in native byte order; floats wider than 32 bits become float32.

    Of several `volumes` it is the mean, in float32; no more than one of them and their sum are held.
    Reads the file to its end, so that a gzip stream's checksum is proved.

    Raises:
        SceneError: There is less or much more data than `header` states.
        OSError, EOFError, zlib.error: The file or its gzip stream is damaged.
    """
    wanted = int(np.prod(header.space, dtype=object)) * np.dtype(header.dtype).itemsize * header.num_volumes
    size = path.stat().st_size
    with _stream(path) as (stream, is_gzip):
        if is_gzip and wanted > size * MAX_GZIP_GAIN:
            raise SceneError(f"the header states {wanted} bytes, which {size} bytes of gzip cannot hold", "impossible_size")
        if not is_gzip and header.data_offset + wanted > size:
            raise SceneError(
                f"truncated: the header states {header.data_offset + wanted} bytes, the file has {size}; copy it again", "truncated"
            )
        values = _mean(stream, header, volumes)
        _skip(stream, header, wanted)
        trailing = stream.read(MAX_TRAILING_BYTES + 1)
    if len(trailing) > MAX_TRAILING_BYTES:
        raise SceneError(f"more than {MAX_TRAILING_BYTES} bytes follow the {wanted} that the header states", "trailing_bytes")
    wide = values.dtype.kind == "f" and values.dtype.itemsize > 4
    with np.errstate(over="ignore"):
        return values.astype(np.float32 if wide else values.dtype.newbyteorder("="))


def _mean(stream: IO[bytes] | gzip.GzipFile, header: VolumeHeader, volumes: Sequence[int]) -> NDArray[np.generic]:
    """The volumes' mean in double precision, or the only one as it is."""
    if len(volumes) == 1:
        return _volume(stream, header, volumes[0])
    total = np.zeros(header.space, np.float64, order="F")
    with np.errstate(invalid="ignore", over="ignore"):
        for number in volumes:
            np.add(total, _volume(stream, header, number), out=total)
    total /= len(volumes)
    return total


def _volume(stream: IO[bytes] | gzip.GzipFile, header: VolumeHeader, number: int) -> NDArray[np.generic]:
    """One of the volumes, read from the stream as it is stored; each lies behind those that were read before."""
    dtype = np.dtype(header.dtype)
    size = int(np.prod(header.space, dtype=object)) * dtype.itemsize
    _skip(stream, header, number * size)
    data = stream.read(size)
    if len(data) < size:
        raise _short(number * size + len(data), size * header.num_volumes)
    return np.frombuffer(data, dtype).reshape(header.space, order="F")


def _skip(stream: IO[bytes] | gzip.GzipFile, header: VolumeHeader, num_bytes: int) -> None:
    """Goes to a byte of the voxels; out of gzip, what lies before it is unpacked in small pieces, and so proved."""
    stream.seek(header.data_offset + num_bytes)
    if stream.tell() < header.data_offset + num_bytes:
        raise _short(max(0, stream.tell() - header.data_offset), num_bytes)


def _short(num_bytes: int, wanted: int) -> SceneError:
    return SceneError(f"truncated: {num_bytes} of {wanted} bytes of voxels; copy it again", "truncated")


def write_like(source: Path, path: Path, values: NDArray[np.generic], slope: float = 1.0) -> None:
    """Writes `values` to `path` as .nii.gz with the geometry of the file `source`, whole or not at all; the same input, the same bytes.

    Bytes on three axes are class numbers and say so (intent code 1002, label); a fourth axis holds a volume for each class.
    """
    like = _unpack_header(source)
    header = type(like)()
    for key in _GEOMETRY:
        header[key] = like[key]
    header["pixdim"][:4] = like["pixdim"][:4]
    if not _is_size(like["pixdim"][1:4]):
        header["pixdim"][:4] = [1.0, *np.linalg.norm(like.get_sform()[:3, :3], axis=0)]
    _write(header, path, values, slope)


def write_on(lattice: VolumeHeader, path: Path, values: NDArray[np.generic], slope: float = 1.0) -> None:
    """Writes `values` to `path` as .nii.gz on a lattice that came from no NIfTI file: in mm, sform and qform code 1 (scanner)."""
    header = nib.Nifti1Header()
    header.set_data_shape(values.shape)  # before the qform, whose voxel sizes it would take back
    header.set_xyzt_units("mm")
    header.set_sform(lattice.grid.matrix, code=1)
    header.set_qform(lattice.grid.matrix, code=1)
    _write(header, path, values, slope)


def _write(header: Any, path: Path, values: NDArray[np.generic], slope: float) -> None:
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    intent = LABEL_INTENT if values.dtype == np.uint8 and values.ndim == 3 else 0
    for key, value in (("vox_offset", header.single_vox_offset), ("scl_slope", slope), ("scl_inter", 0), ("intent_code", intent)):
        header[key] = value
    with written_whole(path) as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as stream:
        stream.write(header.binaryblock + bytes(4) + values.tobytes("F"))


def _turn(one: VolumeHeader, other: VolumeHeader) -> NDArray[np.float64]:
    """Place and sign that each axis of `one` has among those of `other`, as a table of nibabel; sure for oblique ones too."""
    return np.asarray(io_orientation(np.linalg.inv(other.grid.matrix) @ one.grid.matrix))


def _turned(grid: Grid, turn: NDArray[np.float64]) -> Grid:
    space = tuple(grid.space[axis] for axis in np.argsort(turn[:, 0]))
    return Grid.from_matrix(space, grid.matrix @ inv_ornt_aff(turn, grid.space), grid.frame, grid.unit)


def _unpack_header(path: Path) -> Any:
    """The header of a file as it stands there, nothing repaired."""
    with _stream(path) as (stream, _):
        block = stream.read(540)
    for size, kind in ((348, nib.Nifti1Header), (540, nib.Nifti2Header)):
        for code in "<>":
            if len(block) >= size and block[:4] == struct.pack(f"{code}i", size):
                raw = kind(block[:size], endianness=code, check=False)
                magic = bytes(raw["magic"])
                if magic.startswith((b"ni1", b"ni2")):
                    raise SceneError("half of a .hdr/.img pair, not a single NIfTI file; convert it to .nii.gz", "half_pair")
                if magic.startswith((b"n+1", b"n+2")):
                    return raw
    raise SceneError("not NIfTI: no NIfTI-1 or NIfTI-2 header at its beginning", "not_nifti")


def _understand(raw: Any) -> VolumeHeader:
    shape = _shape(raw)
    pixdim = np.asarray(raw["pixdim"][1:4], np.float64)
    has_sform, has_qform = int(raw["sform_code"]) > 0, int(raw["qform_code"]) > 0
    if not has_sform and not _is_size(pixdim):
        raise SceneError(
            f"pixdim {pixdim.tolist()} is zero, negative or not finite, and there is no sform; repair the header", "bad_pixdim"
        )
    try:
        dtype = raw.get_data_dtype()
        affine = np.asarray(raw.get_best_affine(), dtype=np.float64)
        apart = _distance(affine, raw.get_qform(), shape[:3]) if has_sform and has_qform and _is_size(pixdim) else 0.0
    except KeyError as error:
        raise SceneError(f"the header is damaged: no voxel type has the number {error}", "damaged_header") from error
    except (HeaderDataError, ValueError) as error:
        raise SceneError(f"the header is damaged: {error}", "damaged_header") from error
    if dtype.kind not in "iuf":
        raise SceneError(f"voxels of type {dtype} are not supported; real numbers are wanted", "voxel_type")
    doubts = {} if has_sform or has_qform else {"orientation_unknown": "orientation unknown: sform and qform code are both 0"}
    if apart > MAX_DISAGREEMENT_MM:
        doubts["sform_qform_disagree"] = f"sform and qform put a corner {apart:.4g} mm apart, more than {MAX_DISAGREEMENT_MM:g} mm"
    doubts |= _doubts_of_size(pixdim, np.linalg.norm(affine[:3, :3], axis=0)) if has_sform else {}
    affine[:3] *= {1: 1e3, 3: 1e-3}.get(int(raw["xyzt_units"]) & 7, 1.0)
    doubts |= _check_place(affine)
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    slope, intercept = (1.0, 0.0) if np.isnan(slope) or slope == 0 else (slope, 0.0 if np.isnan(intercept) else intercept)
    offset = float(raw["vox_offset"])
    if not (np.isfinite([slope, intercept, offset]).all() and 0 <= offset <= 1 << 26):
        raise SceneError(f"the header is damaged: slope {slope}, intercept {intercept}, data at byte {offset}", "damaged_header")
    rows = tuple(tuple(float(v) for v in row) for row in affine)
    start = max(int(offset), raw.single_vox_offset)
    num_volumes = shape[3] if len(shape) > 3 else 1
    return VolumeHeader(shape[:3], rows, dtype.str, slope, intercept, start, tuple(doubts), tuple(doubts.values()), num_volumes)


def _shape(raw: Any) -> tuple[int, ...]:
    """Three axes, or four for several volumes."""
    dims = [int(v) for v in raw["dim"]]
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise SceneError(f"the header's dim {dims} is no array shape", "bad_dim")
    shape = dims[1 : dims[0] + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) > 4:
        raise SceneError(f"{len(shape)}-D of shape {tuple(shape)}: split it", "five_d")
    if len(shape) < 3:
        raise SceneError(f"{len(shape)}-D of shape {tuple(shape)}; a volume has three axes", "two_d")
    return tuple(shape)


def _is_size(pixdim: NDArray[np.floating]) -> bool:
    return bool(np.isfinite(pixdim).all() and (pixdim > 0).all())


def _doubts_of_size(pixdim: NDArray[np.float64], spacing: NDArray[np.float64]) -> dict[str, str]:
    """What is wrong with the voxel sizes of a header whose sform has these."""
    if not _is_size(pixdim):
        return {"bad_pixdim": f"pixdim {pixdim.tolist()} is zero, negative or not finite, where the sform has {spacing.round(4).tolist()}"}
    if (np.abs(pixdim - spacing) > MAX_PIXDIM_FRACTION * pixdim).any():
        return {"sform_pixdim_disagree": f"the voxel sizes are {spacing.round(4).tolist()} by the sform and {pixdim.tolist()} by pixdim"}
    return {}


def _check_place(affine: NDArray[np.float64]) -> dict[str, str]:
    """What is doubtful about an affine in millimetres that can be used."""
    if not np.isfinite(affine).all():
        raise SceneError("the affine is not finite; repair the header", "bad_affine")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / np.where(spacing > 0, spacing, 1)
    if abs(np.linalg.det(axes)) < 1e-3:
        raise SceneError(f"the affine cannot be inverted: {affine[:3].round(4).tolist()}; repair the header", "bad_affine")
    if spacing.min() < MIN_SPACING_MM or spacing.max() > MAX_SPACING_MM:
        raise SceneError(
            f"spacing {spacing.round(4).tolist()} mm is not between {MIN_SPACING_MM} and {MAX_SPACING_MM} mm", "absurd_spacing"
        )
    shear = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if shear > MAX_SHEAR:
        return {"sheared": f"the affine is sheared: the cosine between two axes is {shear:.3f}, more than {MAX_SHEAR}"}
    return {}


def _distance(one: NDArray[np.float64], other: NDArray[np.float64], shape: Sequence[int]) -> float:
    corners = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape), 1]
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


@contextmanager
def _stream(path: Path) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, bool]]:
    """The uncompressed bytes of a file, and whether they come out of gzip; told by its content, not by its name."""
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if is_gzip:
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield stream, True
        else:
            yield raw, False
