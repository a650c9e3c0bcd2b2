"""What an MR series shows: a channel name (`T1w`, `FLAIR`), from a closed vocabulary and from the physics in its tags.

Descriptions are free text, in which people write names. They are only asked which of the words below they hold; nothing else is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from modalities.dicom_facts import Facts, Frame

UNKNOWN = "MR"
_WORDS: Mapping[str, str] = {
    "t1": r"t1w?(?=[^a-z0-9]|$|post|pre|gd|ce|tse|fse|se|ffe|fl2d|fl3d|spgr|mpr|mprage|vibe|space|flair)",
    "t2": r"t2w?(?=[^a-z0-9*]|$|tse|fse|space|cube|flair|frfse)",
    "t2star": r"t2(?:\*|star| star)|gre|hemo|medic",
    "pd": r"pd(?:w)?|proton",
    "flair": r"(?:t1|t2)?flair|darkfluid",
    "mprage": r"mp2?rage|bravo|spgr|tfl3d|t1ffe",
    "post": r"post(?:gad|gd|con|contrast)?|gad|gado|gadolinium|gd|ce|t1(?:post|gd|ce)|contrast",
    "pre": r"pre(?:con|contrast|gad|gd)?|non ?contrast|without",
    "dwi": r"dwi|dti|diff(?:usion)?|trace|tracew",
    "adc": r"d?adc|apparent diffusion",
    "swi": r"swi|swan|venbold",
    "angio": r"tof|mra|mrv|angio",
    "bold": r"bold|fmri",
    "map": r"map|mapping|t1map|t2map|rho",
}
_PATTERNS = {name: re.compile(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])") for name, pattern in _WORDS.items()}
_PREFIXED = {name: re.compile(rf"(?<![a-z0-9])(?:{_WORDS[name]})") for name in ("t1", "t2")}


def words_of(description: str) -> frozenset[str]:
    """Which words of the vocabulary a description holds."""
    text = description.lower().replace("_", " ")
    found = {name for name, pattern in _PATTERNS.items() if name not in _PREFIXED and pattern.search(text)}
    return frozenset(found | {name for name, pattern in _PREFIXED.items() if pattern.search(text)})


def sequence_of(facts: Facts, frame: Frame, is_diffusion: bool = False) -> str:
    """The channel name of a frame of an MR file, `MR` where neither words nor physics tell; of another file, its modality.

    In this order: a map of diffusion by its image type; a b-value above 0, or `is_diffusion`: others of its series have one; the words
    of the description; the physics of spin echo and inversion recovery with the usual bounds (below). A T1 weighting with a contrast
    agent is `T1ce`; quantitative maps (T1 map) are `MR`.
    """
    if facts.modality != "MR":
        return facts.modality if facts.named_modality == facts.modality else UNKNOWN
    kinds = {part for value in frame.image_type for part in value.split("_")}
    if "ADC" in kinds or "adc" in facts.words:
        return "adc"
    if is_diffusion or frame.b_value or "DIFFUSION" in kinds or "TRACEW" in kinds or "dwi" in facts.words:
        return "dwi"
    if "SWI" in kinds:
        return "swi"
    named = _by_words(facts.words)
    weighting = _by_physics(facts, frame) if named is None else named
    has_agent = "pre" not in facts.words and (facts.has_agent or "post" in facts.words)
    return "T1ce" if weighting == "T1w" and has_agent else weighting


def _by_words(words: frozenset[str]) -> str | None:
    """The weighting that words name; None where they name none."""
    if "map" in words:
        return UNKNOWN
    if "flair" in words:  # "T1 FLAIR" is a T1 weighting with inversion
        return "T1w" if "t1" in words and "t2" not in words else "FLAIR"
    for word, name in (("swi", "swi"), ("angio", "angio"), ("bold", "bold"), ("mprage", "T1w")):
        if word in words:
            return name
    if "t2star" in words and "t1" not in words:
        return "T2star"
    named = [name for word, name in (("t1", "T1w"), ("t2", "T2w"), ("pd", "PD")) if word in words]
    return named[0] if len(named) == 1 else None


def _by_physics(facts: Facts, frame: Frame) -> str:
    """Spin echo and inversion recovery by echo, repetition and inversion time; gradient echo only with inversion (MPRAGE)."""
    echo, repetition, inversion = frame.echo[1], facts.repetition_ms, frame.contrast[0]
    kinds = set(facts.scanning)
    if echo <= 0 or repetition <= 0:
        return UNKNOWN
    if "GR" in kinds:
        return "T1w" if "EP" not in kinds and echo < 10 and 400 <= inversion <= 1500 else UNKNOWN
    if "EP" in kinds or not kinds & {"SE", "IR"}:
        return UNKNOWN
    if inversion > 0 or "IR" in kinds:
        return "FLAIR" if echo >= 60 and repetition >= 4000 and (inversion == 0 or inversion >= 1500) else UNKNOWN
    if echo <= 30 and repetition <= 1200:
        return "T1w"
    if repetition >= 1800:
        return "T2w" if echo >= 70 else "PD" if echo <= 40 else UNKNOWN
    return UNKNOWN
