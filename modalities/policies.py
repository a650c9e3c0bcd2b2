"""What is done with volumes that are doubtful and could be used all the same: by default, and as the settings say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from modalities.reasons import REASONS
from modalities.scene import AdapterSettings, SceneError

Verdict = Literal["reject", "use"]


class VolumePolicies(AdapterSettings):
    """Whether a volume with a doubt is rejected, or used with the doubt as a flag of its scene; by reason code.

    Attributes:
        bad_pixdim: A voxel size in the header is zero, negative or no number. use: take the sizes of the sform, and write them with
            labels; a file that has no sform is rejected whatever is set here.
        looks_like_labels: It holds 16 or fewer whole numbers, as a label map does.
        not_finite: Some voxels hold no finite number. use: they count nowhere; a file of nothing else is rejected whatever is set here.
        orientation_unknown: sform and qform code are both 0, so nobody said which side is left. use: take the affine that nibabel
            assumes (left-handed, centred).
        sform_pixdim_disagree: The voxel sizes of sform and pixdim differ by more than 1 %. use: take those of the sform.
        sform_qform_disagree: sform and qform put a corner of the volume more than 1 mm apart. use: take the sform.
        sheared: Two axes are more than a degree away from a right angle. use: keep the axes, with the spacing along each.
    """

    bad_pixdim: Verdict = "reject"
    looks_like_labels: Verdict = "reject"
    not_finite: Verdict = "use"
    orientation_unknown: Verdict = "use"
    sform_pixdim_disagree: Verdict = "use"
    sform_qform_disagree: Verdict = "use"
    sheared: Verdict = "reject"

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        unknown = sorted(set(values) - set(cls.model_fields)) if isinstance(values, Mapping) else []
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no code that has a policy; those that have one: {', '.join(cls.model_fields)}")
        return values

    def judge(self, flag: str, said: str = "") -> None:
        """Stops at a doubt that is not to be used; a flag that is no policy passes.

        Args:
            flag: The reason code.
            said: What came, in words; else what the code means.

        Raises:
            SceneError: With this code.
        """
        if getattr(self, flag, "use") == "reject":
            reason = REASONS[flag]
            what = said or reason.meaning
            raise SceneError(f"{what}; {reason.remedy}, or set reader.policies.{flag}=use", flag)
