"""Why a scan is not used, or used with a flag: every reason code with its meaning and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """What a code says.

    Attributes:
        meaning: In one line.
        remedy: What to do about it.
        is_damage: Whether a file with it is broken, and not merely of no use here; too many of them stop a run.
    """

    meaning: str
    remedy: str
    is_damage: bool = False

    @property
    def text(self) -> str:
        """Both, as a message about a file says it."""
        meaning = f"{self.meaning[0].lower()}{self.meaning[1:]}"
        return meaning if self.remedy == "nothing" else f"{meaning}; {self.remedy}"


_COPY = "copy the file again from where it came"
_EXPORT = "export the series again from where it came, with all of its tags"
_REPAIR = "repair the header, or convert the scan again from its DICOM files"
_EXCLUDE = "nothing, or exclude it (reader.exclude)"

REASONS = {
    "absurd_spacing": Reason("A voxel is smaller than 0.01 mm or larger than 100 mm", _REPAIR, is_damage=True),
    "all_zero": Reason("All voxels hold 0", _EXCLUDE, is_damage=True),
    "b_value_absent": Reason(
        "No volume of a diffusion file has the b-value that was asked for", "set reader.four_d.dwi to one that is there"
    ),
    "b_values_broken": Reason("The .bval file has not one b-value for each volume", "repair the .bval file", is_damage=True),
    "b_values_missing": Reason("A diffusion file of several volumes has no .bval file beside it", "give one, or set reader.four_d.dwi"),
    "bad_affine": Reason("The affine holds no numbers, or two axes of it fall together", _REPAIR, is_damage=True),
    "bad_dim": Reason("The header states no shape that an array can have", _COPY, is_damage=True),
    "bad_orientation": Reason("The directions of rows and columns are no unit vectors at a right angle", _REPAIR, is_damage=True),
    "bad_pixdim": Reason("A voxel size in the header is zero, negative or no number", _REPAIR, is_damage=True),
    "bidsignore": Reason("The .bidsignore of its BIDS dataset names it", "take it out of .bidsignore to read it"),
    "burned_in": Reason(
        "The header says that writing is burned into the picture, which may name a person", "exclude it, or have the writing removed"
    ),
    "changed": Reason("The file is another than when the archive was scanned", "scan again", is_damage=True),
    "colour": Reason("A colour picture, or one by a palette", _EXCLUDE),
    "constant": Reason("All voxels hold the same value, which is not 0", _EXCLUDE, is_damage=True),
    "constant_foreground": Reason("All voxels that are not air hold the same value", _EXCLUDE),
    "copied_file": Reason("The same DICOM image (SOPInstanceUID) as another file; one of them is used", "nothing, or delete the copies"),
    "crosswalk": Reason("The crosswalk cannot be written, or not there", "choose another place for --crosswalk"),
    "damaged_gzip": Reason("The gzip stream is damaged or its checksum is wrong", _COPY, is_damage=True),
    "damaged_header": Reason("The header holds what no header of its format can", _COPY, is_damage=True),
    "damaged_picture": Reason("The PNG is damaged", _COPY, is_damage=True),
    "damaged_pixels": Reason("Compressed pixels that cannot be decoded", _COPY, is_damage=True),
    "derivative": Reason("Computed from other scans of its BIDS dataset (derivatives)", "set reader.derivatives=true to read it"),
    "dicomdir": Reason("A DICOMDIR, which only lists other files", "nothing"),
    "duplicate": Reason(
        "The same voxels are there under another name, in whatever order, unit or format",
        "nothing; or set reader.duplicates=keep, if the copies are wanted",
    ),
    "duplicate_slice": Reason(
        "Images of one series lie at the same position, and no time tells them apart",
        "export the series again, without what was added to it",
    ),
    "few_planes": Reason("An axis has fewer voxels than reader.min_planes", "set reader.min_planes, or exclude it"),
    "fieldmap": Reason("A map of the scanner's field, by its BIDS name or folder", "nothing"),
    "five_d": Reason("More than four axes", "split the file"),
    "four_d": Reason("Several volumes in one file", "set reader.four_d for its sequence, or split the file"),
    "gantry_tilt": Reason("Slices are stacked more than a degree off their normal", "resample it to a right-angled grid"),
    "half_pair": Reason("Half of a pair of a header and an image file", "convert the pair to .nii.gz"),
    "impossible_size": Reason("The header states more voxels than the file can hold", _COPY, is_damage=True),
    "key": Reason("The key of the pseudonyms cannot be read, or others can read it", "set TERRAVOX_KEY_FILE, or chmod 600 the key"),
    "labels": Reason("A map of labels by its BIDS name", "give it where labels are asked for"),
    "labels_elsewhere": Reason("A label file lies on another grid than its scan", "resample the labels with nearest neighbour"),
    "labels_not_whole": Reason("A label file holds values that are no class numbers", "give class numbers instead of probabilities"),
    "localizer": Reason("A localiser, made to plan other scans by", "nothing"),
    "looks_like_labels": Reason(
        "It holds 16 or fewer whole numbers, as a label map does", "keep labels in a folder of their own, or exclude it"
    ),
    "marks_ambiguous": Reason("Several files of reader.defaced or reader.anatomy belong to it", "name them apart, or narrow the pattern"),
    "marks_elsewhere": Reason("The file that marks its face or anatomy lies on another grid", "resample that file with nearest neighbour"),
    "marks_most": Reason("More than half of it is marked as a face", "set reader.defaced_where to the other one"),
    "marks_nothing": Reason("A file of reader.defaced or reader.anatomy that belongs to no scan in use", "name it after its scan"),
    "missing_slice": Reason("A slice of the series is not there", "copy the series again from where it came", is_damage=True),
    "mosaic": Reason(
        "A Siemens mosaic without the private header that says how many slices it has",
        "export it again with private tags, or as an enhanced file",
    ),
    "no_decoder": Reason("No decoder for its transfer syntax is installed", "pip install 'terravox[dicom]', or export it uncompressed"),
    "no_foreground": Reason("Nothing in it is body", _EXCLUDE),
    "no_pixels": Reason("A DICOM file of a scan without pixels, or one that ends before them", _COPY, is_damage=True),
    "no_position": Reason("Nobody said where its slices lie", _EXPORT),
    "no_segmentation": Reason("No DICOM segmentation can be made: it is no DICOM series, or lacks tags", "leave out dicom_seg"),
    "no_series": Reason("Nobody said which series it belongs to", _EXPORT),
    "no_spacing": Reason("Nobody said how large its pixels are", f"{_EXPORT}; or, of X-ray pictures, set reader.spacing_mm=null"),
    "not_an_image": Reason("DICOM, but no image that was measured (a report, contours, a segmentation)", "nothing"),
    "not_coregistered": Reason(
        "It lies on another lattice than most sequences of its session", "register and resample it, or set reader.other_lattice=separate"
    ),
    "not_data": Reason("Code, stimuli or transforms of a BIDS dataset", "nothing"),
    "not_finite": Reason("Voxels hold no finite number; where the file is rejected by default, all of them", _EXCLUDE, is_damage=True),
    "not_magnitude": Reason("The phase, real or imaginary part of an MR image", "nothing"),
    "not_nifti": Reason("There is no NIfTI header at the file's beginning", _COPY, is_damage=True),
    "orientation_unknown": Reason("Both sform and qform code are 0: nobody said which side is left", _REPAIR),
    "other_format": Reason("A scan in a format that is not read (MGZ, MINC, NRRD, Analyze…)", "convert it to .nii.gz"),
    "other_modality": Reason(
        "Another modality than the reader's kind", "read it with the kind of its own (mri, ct), in a store of its own"
    ),
    "phase": Reason("Phase, or a real or imaginary part, by its BIDS name", "nothing; the magnitude is read"),
    "pixel_layout": Reason("Bits or colours of pixels that are not supported", "convert it, or exclude it"),
    "reference_scan": Reason("A reference scan of another series, by its BIDS name", "nothing"),
    "repeated_sequence": Reason(
        "Its session has another scan of the same sequence, which is used", "name them apart, exclude one, or set reader.repeated=separate"
    ),
    "several_frames": Reason("Several frames in a file, where one X-ray picture is wanted", _EXCLUDE),
    "sform_pixdim_disagree": Reason("The voxel sizes of sform and pixdim differ by more than 1 %", _REPAIR),
    "sform_qform_disagree": Reason("By sform and by qform a corner of the volume lies more than 1 mm apart", _REPAIR),
    "sheared": Reason("Two axes are more than a degree away from a right angle", "resample it to a right-angled grid", is_damage=True),
    "single_slice": Reason("A series of one slice", _EXCLUDE),
    "small_field": Reason("The volume is shorter than reader.min_field_mm along an axis", "set reader.min_field_mm, or exclude it"),
    "source_data": Reason("What scans of its BIDS dataset were converted from (sourcedata)", "give its folder as data to read it"),
    "time_series": Reason(
        "Several images at every position: a time series, or directions of diffusion", "set reader.four_d for its sequence, or exclude it"
    ),
    "too_large": Reason("More voxels than reader.max_voxels, as stored or at the wanted spacing", "set reader.max_voxels, or exclude it"),
    "trailing_bytes": Reason("More than a megabyte follows the voxels", _COPY, is_damage=True),
    "truncated": Reason("The file ends before its voxels do", _COPY, is_damage=True),
    "two_d": Reason("Fewer than three axes", _EXCLUDE),
    "uneven_spacing": Reason("Slices that are not the same distance apart, by more than a tenth of it", "resample it to an even grid"),
    "unreadable": Reason("The file cannot be opened or read", "look after the disk and the file's permissions", is_damage=True),
    "unsaid_picture": Reason("A picture of which nobody says what it shows", "read X-ray pictures with reader.kind=xray"),
    "voxel_type": Reason("Voxels that are no real numbers (colours, complex)", "convert it, or exclude it"),
}
"""By code. Codes are what programs count by; the words of a message may change. Some are flags of scans that are used, too."""
