"""The checkpoints of a run: which there are, which stay, which one a run goes on from, and whether every byte is as it was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mae_core.checkpoint import FORMAT, POINTER, RECORD, CheckpointError, newest, problem, refuse_others, step_of, steps
from mae_core.sealed import MANIFEST
from mae_core.settings import Settings
from pipelines.command_line import run
from pipelines.progress import console, table

DESCRIPTION = (
    "lists the checkpoints of a run or of the arms of a fine-tuning and verifies every file; exit code 1 if any is damaged. "
    "Run it as: python pipelines/checkpoints.py RUN"
)


class CheckpointsSettings(Settings):
    """Settings of `checkpoints`."""

    run: Path = Field(description="Folder of a run of pretrain or finetune_segmentation; also the first word")
    format: Literal["text", "json"] = Field("text", description="For people or for scripts; --json is short for json")


@dataclass(frozen=True)
class Found:
    """A checkpoint.

    Attributes:
        place: Its folder in that of the run.
        step: Updates done.
        written: When, by the clock of who wrote it, in UTC.
        num_bytes: Of its files.
        stays: `for ever`, or `rolling` where it goes when newer ones come.
        latest: Whether the run would go on from it.
        wrong: What is damaged; None if it is sound.
        record_format: Of its record; None where that cannot be read.
        processes: That trained when it was written; None where nobody knows.
    """

    place: str
    step: int
    written: str
    num_bytes: int
    stays: str
    latest: bool
    wrong: str | None
    record_format: int | None
    processes: int | None


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Folders of checkpoints of a run: its own, and those of its arms.

    Raises:
        CheckpointError: There is none.
    """
    if not run_folder.is_dir():
        raise CheckpointError(f"{run_folder} is no folder; give the folder of a run")
    found = [path for pattern in ("checkpoints", "*/checkpoints") for path in sorted(run_folder.glob(pattern)) if path.is_dir()]
    if not found:
        raise CheckpointError(f"{run_folder} holds no checkpoints; give the folder of a run that has begun to train (its --out)")
    return found


def listed(folder: Path, run_folder: Path) -> Iterator[Found]:
    """Every checkpoint of a folder, oldest first, each verified now."""
    pointer = newest(folder)
    records = {path: _record(path) for path in steps(folder)}
    settings = [record.get("settings") or {} for record in records.values()]
    for_ever = (settings[-1].get("train") or {}).get("keep_every_steps") if settings else None
    for path, record in records.items():
        try:
            wrong = problem(path) or _refused(path)
            size = sum(file.stat().st_size for file in path.iterdir())
            manifest = path / MANIFEST
            written = (manifest if manifest.exists() else path).stat().st_mtime
        except FileNotFoundError:
            continue  # the run that writes here has just dropped it
        yield Found(
            place=str(path.relative_to(run_folder)),
            step=step_of(path),
            written=datetime.fromtimestamp(written, UTC).isoformat(sep=" ", timespec="seconds"),
            num_bytes=size,
            stays="for ever" if for_ever and step_of(path) % for_ever == 0 else "rolling",
            latest=path == pointer,
            wrong=wrong,
            record_format=record.get("format", 1) if record else None,
            processes=record.get("world_size"),
        )


def pointer_problem(folder: Path) -> str | None:
    """What is wrong with a pointer, or None; checkpoints of format 1 had none."""
    if not (folder / POINTER).exists():
        return None
    pointer = newest(folder)
    if pointer is None:
        return f"{POINTER} cannot be read; a run goes on from the newest sound checkpoint"
    gone = f"{POINTER} names {pointer.name}, which is not there; a run goes on from the newest sound checkpoint"
    return None if pointer.is_dir() else gone


def work(settings: CheckpointsSettings) -> int:
    """List and verify; 1 if anything is damaged."""
    folders = checkpoint_folders(settings.run)
    found = [(folder, list(listed(folder, settings.run)), pointer_problem(folder)) for folder in folders]
    damaged = any(wrong or any(each.wrong for each in items) for _, items, wrong in found)
    if settings.format == "json":
        every = [asdict(each) for _, items, _ in found for each in items]
        pointers = {str(folder.relative_to(settings.run)): wrong for folder, _, wrong in found if wrong}
        print(json.dumps({"checkpoints": every, "pointers": pointers, "sound": not damaged}, indent=1, ensure_ascii=False))
        return int(damaged)
    for folder, items, wrong in found:
        rows = [_row(each) for each in items]
        table(str(folder.relative_to(settings.run)), ("step", "written (UTC)", "MB", "stays", "", "processes", "state"), rows)
        if wrong:
            console.print(wrong, markup=False)
        if leftovers := sum(1 for _ in folder.glob("*.tmp")):
            console.print(f"{leftovers} left half written or half deleted by a kill; the next start deletes them", markup=False)
    count = sum(len(items) for _, items, _ in found)
    bad = [f"{each.place}: {each.wrong}" for _, items, _ in found for each in items if each.wrong]
    for line in bad:
        console.print(line, markup=False)
    if any(each.record_format not in (None, FORMAT) for _, items, _ in found for each in items):
        console.print(f"older formats are brought to {FORMAT} when they are restored", markup=False)
    number = "1 checkpoint" if count == 1 else f"{count} checkpoints"
    console.print(f"{number} in {settings.run}: {f'{len(bad)} damaged' if bad else 'all sound'}", markup=False)
    return int(damaged)


def _row(each: Found) -> tuple[str, ...]:
    old = f", format {each.record_format}" if each.record_format not in (None, FORMAT) else ""
    processes = "" if each.processes is None else str(each.processes)
    latest = "latest" if each.latest else ""
    state = "damaged" if each.wrong else f"sound{old}"
    return str(each.step), each.written[:19], f"{each.num_bytes / 1e6:.1f}", each.stays, latest, processes, state


def _record(path: Path) -> dict[str, Any]:
    """Its record, or nothing where it cannot be read, which verifying tells."""
    try:
        content = json.loads((path / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refused(path: Path) -> str | None:
    """Why what is whole would not be loaded."""
    try:
        refuse_others([path.parent, path, *path.iterdir()])
    except CheckpointError as error:
        return str(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and ("=" not in words[0] or Path(words[0]).exists()):
        words[0] = f"run={words[0]}"
    words = ["format=json" if word == "--json" else word for word in words]
    return run("checkpoints", CheckpointsSettings, work, description=DESCRIPTION, expected=(CheckpointError,), argv=words)


if __name__ == "__main__":
    sys.exit(main())
