"""How an archive of scans is read: settings that all of its formats share."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from modalities.four_d import FOUR_D, with_defaults
from modalities.nifti_file import MAX_SPACING_MM, MIN_SPACING_MM
from modalities.policies import VolumePolicies
from modalities.scene import AdapterSettings

Duplicates = Literal["refuse", "keep"]
SpacingMm = Annotated[float, Field(ge=MIN_SPACING_MM, le=MAX_SPACING_MM)]
GROUP_PATTERN = r"(?i)(?:^|[/_-])(sub-[a-z0-9]+|patient[-_]?[0-9]+)"


class ScanSettings(AdapterSettings):
    """How a folder of scans of patients is read, whatever was measured.

    Attributes:
        exclude: Patterns of file names or relative paths to leave out, as in a shell.
        group_pattern: Regular expression, searched in the relative path of a file that does not name the patient itself; its first group
            that matches does, whatever the case. Where nothing matches, the path without its sequence (`T1`, `FLAIR`…) does.
        duplicates: What to do with a scan whose voxels are there under another name, in whatever order, unit or format: refuse all but
            one, or keep them; the patients that they are of are on one side of every split in either case.
    """

    kind: str
    exclude: tuple[str, ...] = ()
    group_pattern: str = GROUP_PATTERN
    duplicates: Duplicates = "refuse"

    @field_validator("group_pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if not groups:
            raise ValueError("it needs a group in parentheses around what names the patient")
        return value


class VolumeSettings(ScanSettings):
    """How a folder of volumes is read, whatever was measured.

    Attributes:
        spacing_mm: Spacing of the scenes along the axes that lie closest to R, A and S; None keeps each file's own.
        patient_scope: Where a patient's label in a BIDS tree is unique, whose file names say it themselves: in its dataset, as BIDS has
            it, so that `sub-01` of two datasets are two patients; or in the whole archive, where labels are a hospital's. Outside of
            BIDS datasets it always is the archive.
        derivatives: Also read scans in `derivatives` of a BIDS dataset, which were computed from its others.
        min_planes: Fewest voxels on an axis of a usable volume.
        min_field_mm: Least extent of a usable volume along an axis.
        policies: What is done with volumes that are doubtful and could be used all the same.
        four_d: What becomes of a NIfTI file with several volumes, by sequence, and under `default` for all others: reject, first, mean, or
            the mean of those of a b-value (b0, b1000) by the .bval file of the same name. More than four axes are always rejected.
        through_plane: How values are interpolated to a smaller spacing along the axis of largest spacing, where that is more than 3 times
            the smallest: nearest keeps slices as they were measured (as nnU-Net does), linear mixes neighbours. All else is linear.
        max_voxels: Most voxels of a volume as stored and as resampled; looked at before any data is read.
        sequences: each: every scan is a scene of its own; session: the scans of one session that lie on one lattice (equal shape, affines
            equal within 0.001, in whatever order of axes) are one scene with a channel each. A session is what BIDS or DICOM call so,
            else what one folder holds of a patient. A voxel that one of them has no number for counts in none.
        other_lattice: With sequences=session, what becomes of scans on another lattice than the largest set of sequences in their
            session: separate: scenes of their own, again with those that share theirs; refuse.
        repeated: With sequences=session, what becomes of a second scan of a sequence on the lattice of the first by name: separate: a
            scene of its own; refuse.
        sequence: Channel name of all files; None takes it from each file's name, else from a folder that is called like a sequence (`MR`
            where there is none).
        sequence_names: Channel names of the NIfTI files whose name or relative path fits a pattern, such as {"*mprage*": "T1w"}; the first
            that fits goes before `sequence`.
        defaced: Pattern of NIfTI files that mark the face in a scan, taken away or not (`*_desc-deface_mask.nii.gz`).
            What they mark is in no statistic, no input, no target and no loss. How a file finds its scan: `modalities.beside`.
        defaced_where: Whether such a file marks by what is not zero, or by zero, as those do that a scan was multiplied with.
        anatomy: Pattern of NIfTI files that are not zero inside of the anatomy that matters (a brain). What lies outside is taken for
            background: it is fed, and is in no statistic and no pretraining loss; intensities are normalised over what lies inside.
    """

    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm] | None = (1.0, 1.0, 1.0)
    patient_scope: Literal["dataset", "archive"] = "dataset"
    derivatives: bool = False
    min_planes: int = Field(default=5, ge=1)
    min_field_mm: float = Field(default=5.0, ge=0)
    policies: VolumePolicies = VolumePolicies()
    four_d: dict[str, str] = Field(default=FOUR_D)
    through_plane: Literal["nearest", "linear"] = "nearest"
    max_voxels: int = Field(default=1 << 28, ge=1)
    sequences: Literal["each", "session"] = "each"
    other_lattice: Literal["separate", "refuse"] = "separate"
    repeated: Literal["separate", "refuse"] = "separate"
    sequence: str | None = Field(default=None, min_length=1)
    sequence_names: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    defaced: str | None = Field(default=None, min_length=1)
    defaced_where: Literal["not_zero", "zero"] = "not_zero"
    anatomy: str | None = Field(default=None, min_length=1)

    @field_validator("four_d")
    @classmethod
    def _four_d(cls, value: dict[str, str]) -> dict[str, str]:
        return with_defaults(value)


class MriSettings(VolumeSettings):
    """How an archive of MRI is read.

    Attributes:
        intensity: What the values of each scan are brought to, over its foreground. zscore: mean 0 and deviation 1 of what lies between
            the 0.5 and the 99.5 percentile. percentile: the 0.5 percentile is 0, the 99.5 is 1, and values beyond are cut to these.
    """

    kind: Literal["mri"] = "mri"
    intensity: Literal["zscore", "percentile"] = "zscore"


class CtSettings(VolumeSettings):
    """How an archive of CT is read: in Hounsfield units (HU), the same for every scan.

    Attributes:
        window_hu: Values beyond are cut to these when a scan is read. The default holds all from air to dense bone; [-160, 240] is the
            usual one for soft tissue, [-1000, 400] for lungs.
    """

    kind: Literal["ct"] = "ct"
    sequence: str | None = Field(default="CT", min_length=1)
    window_hu: tuple[float, float] = (-1000.0, 1000.0)

    @field_validator("window_hu")
    @classmethod
    def _window(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not -1024 <= value[0] < value[1] <= 32767:
            raise ValueError("two rising numbers from -1024 to 32767 HU are wanted")
        return value


class XraySettings(ScanSettings):
    """How an archive of plain X-ray pictures is read: DICOM (CR, DX, MG) of one frame, and grey PNG of 8 or 16 bits.

    Attributes:
        spacing_mm: Distance between rows and between columns of the scenes; None keeps each picture's own. A picture of which nobody
            knows the spacing is refused where one is wanted.
        intensity: As of `MriSettings`, over what was exposed.
        voi: Which grey values of a DICOM file are fed. In every case they are what stored values stand for (Modality LUT, or rescale slope
            and intercept), and MONOCHROME1 or an inverse presentation turns them once, after everything else, so that more is denser.
            none feeds them as they were measured. window cuts them to the first display window with its function: LINEAR and
            LINEAR_EXACT to its ends, rounded inwards to whole stored values; SIGMOID makes of each the share of the way from black to
            white, as float32; a file without a window goes through its first VOI LUT. lut takes the VOI LUT first, and the window where
            there is none. A file that has neither, and a PNG, is fed as it is.
        burned_in: What becomes of a picture whose header says that there is writing in it, which may name the patient.
        max_pixels: Most pixels of a picture; looked at before any is read.
    """

    kind: Literal["xray"] = "xray"
    spacing_mm: tuple[SpacingMm, SpacingMm] | None = None
    intensity: Literal["zscore", "percentile"] = "zscore"
    voi: Literal["none", "window", "lut"] = "none"
    burned_in: Literal["reject", "use"] = "reject"
    max_pixels: int = Field(default=1 << 27, ge=1)


class MedicalSettings(VolumeSettings):
    """How a mixed archive is read to be catalogued: every scan with the default intensities of its own modality."""

    kind: Literal["medical"] = "medical"
