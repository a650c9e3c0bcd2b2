"""A tile store from outside: what it holds, whether it is whole, single tiles as files, one page of pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mae_core.settings import Settings
from mae_core.shards import StoreError
from modalities.scene import SceneError
from pipelines.command_line import run
from pipelines.frozen_split import DrawSettings
from pipelines.progress import console, counting
from pipelines.run_folder import RunError
from pipelines.tiling_plan import PreparationError

SUBJECTS = {
    "info": "what a store holds, from its metadata; --json prints it for scripts",
    "verify": "whether a store is whole: every file, every tile's chunk, all that is wrong by array and tiles; exit code 1 if anything is",
    "export": "tiles as GeoTIFF or NIfTI at their place, with their quality and labels beside",
    "merge": "several stores as one: a folder that names them, with nothing copied; takes several stores",
    "split": "which groups are on which side, frozen in a file that prepare.split.file takes: as in the store, or drawn anew",
    "sheet": "one page on a store as a picture: tiles, histograms, where they lie, what was thrown away",
}
EXPECTED = (StoreError, SceneError, RunError, PreparationError)


def _several(value: Any) -> Any:
    """One number where a list is wanted is a list of one."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


class StoreSettings(Settings):
    """What every subject is told."""

    store: str = Field(description="Folder of a store, of a view of several, or URL of a store; also the first word after the subject")


class InfoSettings(StoreSettings):
    """Settings of `store info`."""

    format: Literal["text", "json"] = Field("text", description="For people or for scripts; --json is short for json")


class VerifySettings(StoreSettings):
    """Settings of `store verify`."""

    decode: bool = Field(False, description="Also unpack every chunk; without it, only those of shards that fail their sha256")


class ExportSettings(StoreSettings):
    """Settings of `store export`."""

    tile: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_several)] = Field(
        min_length=1, description="Numbers of tiles, such as 7 or [7,12]; the index and the sheet have them"
    )
    out: Path = Field(description="Folder; for one tile also a file that ends in .tif (images) or .nii.gz (volumes)")


class MergeSettings(Settings):
    """Settings of `store merge`."""

    stores: tuple[Path, ...] = Field(min_length=2, description="Folders of the stores; also the first words after the subject")
    out: Path = Field(description="Folder of the view, new or empty")


class SplitVerbSettings(StoreSettings):
    """Settings of `store split`."""

    out: Path = Field(description="File to write; ends in .json, and is not overwritten")
    draw: DrawSettings | None = Field(None, description="Draws sides anew (default: as the store is divided)")


class SheetSettings(StoreSettings):
    """Settings of `store sheet`."""

    out: Path = Field(description="Picture to write; ends in .png")
    seed: int = Field(0, ge=0, description="Draws the tiles that are shown and measured")


def info(settings: InfoSettings) -> int:
    """Tell what a store holds."""
    from mae_core.store import TileStore
    from pipelines.store_facts import facts, tell

    found = facts(TileStore.open(settings.store, verify="sizes"))
    if settings.format == "json":
        print(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        tell(found)
    return 0


def verify(settings: VerifySettings) -> int:
    """Tell all that is wrong with a store; 1 if anything is."""
    from mae_core.store_check import check_store

    with counting("verifying", "MB") as progress:
        found = check_store(settings.store, decode=settings.decode, progress=lambda done, total: progress(done // 10**6, total // 10**6))
    rate = found.num_bytes / 1e6 / max(found.seconds, 1e-9)
    done = f"{found.num_files} files, {found.num_bytes / 1e6:.1f} MB at {rate:.0f} MB/s"
    done += f", {found.num_decoded} chunks unpacked" if found.num_decoded else ""
    if not found.problems:
        console.print(f"{settings.store} is whole: {found.num_tiles} tiles, {done}", markup=False)
        return 0
    for problem in found.problems:
        console.print(problem, markup=False)
    count = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
    console.print(f"{settings.store} is damaged: {count} ({done}). Restore it from a copy, or delete it and prepare again", markup=False)
    return 1


def export(settings: ExportSettings) -> int:
    """Write tiles as files."""
    from pipelines.store_export import export_tiles

    for line in export_tiles(settings.store, settings.tile, settings.out):
        console.print(line, markup=False)
    return 0


def merge(settings: MergeSettings) -> int:
    """Write the view of several stores."""
    from pipelines.store_merge import merge_stores

    view = merge_stores(settings.stores, settings.out)
    sides = ", ".join(f"{len(view.rows(side))} {side}" for side in ("train", "val", "test") if side != "test" or len(view.rows("test")))
    console.print(
        f"{settings.out}: a view of {len(view.folders)} stores, {len(view)} tiles ({sides}), channels {', '.join(view.channels)}; "
        f"digest {view.digest[:12]}",
        markup=False,
    )
    return 0


def check_merge(settings: MergeSettings) -> list[str]:
    """Problems that only the stores can tell."""
    from pipelines.store_merge import checked

    try:
        checked(settings.stores, settings.out)
    except StoreError as error:
        return [str(error)]
    return []


def freeze_split(settings: SplitVerbSettings) -> int:
    """Write the frozen split of a store's groups."""
    from mae_core.store import TileStore
    from pipelines.frozen_split import frozen_from, refuse_place, write_split

    refuse_place(settings.out)
    split = frozen_from(TileStore.open(settings.store, verify="sizes"), settings.draw)
    write_split(settings.out, split)
    console.print(f"{settings.out}: {split.words}", markup=False)
    return 0


def sheet(settings: SheetSettings) -> int:
    """Write the sheet of a store."""
    from mae_core.figures import save_picture
    from mae_core.store import TileStore
    from mae_core.store_sheet import store_sheet

    if settings.out.suffix != ".png":
        raise RunError(f"--out {settings.out} must end in .png")
    store = TileStore.open(settings.store, verify="sizes")
    aside = settings.out.with_name(f".{settings.out.stem}.tmp.png")
    try:
        save_picture(store_sheet(store, settings.seed), aside)
        aside.replace(settings.out)
    finally:
        aside.unlink(missing_ok=True)
    console.print(f"{settings.out}: the sheet of {settings.store}, {len(store)} tiles", markup=False)
    return 0


def check(settings: StoreSettings) -> list[str]:
    """Problems that only the store can tell."""
    from mae_core.store import TileStore

    try:
        store = TileStore.open(settings.store, verify="sizes")
        if isinstance(settings, ExportSettings):
            from pipelines.store_export import planned

            planned(store, settings.tile, settings.out)
    except EXPECTED as error:
        return [str(error)]
    return []


def arguments(words: Sequence[str]) -> list[str]:
    """The words after the subject in the grammar of all verbs: a first word that is no setting is the store."""
    rest = list(words)
    if rest and _is_store(rest[0]):
        rest[0] = f"store={rest[0]}"
    short = {"--json": "format=json", "json=true": "format=json", "json=false": "format=text"}
    return [short.get(word, word) for word in rest]


def several(words: Sequence[str]) -> list[str]:
    """The same for a subject that takes several stores: all first words that are no setting."""
    stores = list(takewhile(_is_store, words))
    return [*([f"stores={json.dumps(stores)}"] if stores else []), *words[len(stores) :]]


def _is_store(word: str) -> bool:
    return not word.startswith("-") and ("=" not in word or Path(word).exists())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb on the subject that the first argument names; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print(help_text())
        return 0 if words else 2
    if words[0] not in SUBJECTS:
        near = get_close_matches(words[0], SUBJECTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"subjects are {', '.join(SUBJECTS)}"
        print(f"terravox store: unknown subject {words[0]}; {hint}", file=sys.stderr)
        return 2
    return subject(words[0])(several(words[1:]) if words[0] == "merge" else arguments(words[1:]))


def subject(name: str) -> Callable[[Sequence[str]], int]:
    """What runs a subject with its arguments."""

    def chosen(argv: Sequence[str]) -> int:
        stores = "STORE STORE..." if name == "merge" else "STORE"
        about = f"{SUBJECTS[name]}. Run it as: python pipelines/store.py {name} {stores} [KEY=VALUE]..."
        match name:
            case "info":
                return run("store", InfoSettings, info, check=check, description=about, expected=EXPECTED, argv=argv)
            case "verify":
                return run("store", VerifySettings, verify, description=about, expected=EXPECTED, argv=argv)
            case "export":
                return run("store", ExportSettings, export, check=check, description=about, expected=EXPECTED, argv=argv)
            case "merge":
                return run("store", MergeSettings, merge, check=check_merge, description=about, expected=EXPECTED, argv=argv)
            case "split":
                return run("store", SplitVerbSettings, freeze_split, check=check, description=about, expected=EXPECTED, argv=argv)
            case "sheet":
                return run("store", SheetSettings, sheet, check=check, description=about, expected=EXPECTED, argv=argv)
        raise ValueError(f"{name} is no subject; subjects are {', '.join(SUBJECTS)}")

    return chosen


def help_text() -> str:
    """What `--help` without a subject prints."""
    width = max(map(len, SUBJECTS)) + 2
    lines = [
        "usage: python pipelines/store.py SUBJECT STORE [KEY=VALUE | --KEY VALUE]...",
        "       python pipelines/store.py SUBJECT --help",
    ]
    return "\n".join([*lines, "", "subjects:", *(f"  {name:<{width}}{what}" for name, what in SUBJECTS.items())])


if __name__ == "__main__":
    sys.exit(main())
