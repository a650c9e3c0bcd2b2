"""A day in miniature: one pretraining is ended many times at random moments, and run again until it is finished.

    python tests/faults/day.py [--store STORE] [--kills 20] [--ranks 1 2] [--seed 0] [--out FOLDER] [section.key=value ...]

Signals (SIGKILL, SIGTERM, SIGUSR1), moments, numbers of processes, of reading threads and of batches read ahead are drawn from the
seed. What comes out is held against a quiet run of one process: weights and optimiser bit for bit where an update is made of two
micro-batches at most (two terms give one sum in any order, so one process and two compute the same), else how far they are apart; the
metrics' rows; one tracked run; one row for each key and step. Exit code 1 if it does not hold.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mae_core.checkpoint import steps
from pipelines.run_folder import RESULT
from tests.faults.strikes import Ended, Strike, rows_of, run_verb, tensors_of
from tests.tiny_runs import TINY, arguments, tiny_store

STARTING = 0.1
"""Share of the kills that come while the process still starts."""

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
TINY_STEPS, TINY_EVERY = 160, 4


@dataclass(frozen=True)
class Attempt:
    """One go.

    Attributes:
        ranks: Processes.
        threads, prefetch: Of the loader.
        strike: What was to end it.
        ended: What did.
        seconds: That it lasted.
    """

    ranks: int
    threads: int
    prefetch: int
    strike: Strike | None
    ended: Ended
    seconds: float

    def row(self, number: int) -> str:
        """A row of the table."""
        ended = self.ended
        who = ""
        if self.strike is not None and self.ranks > 1:
            who = " to all" if self.strike.rank < 0 else f" to rank {self.strike.rank % self.ranks}"
        how = "ran to its end" if self.strike is None else f"{self.strike.how.name}{who} in {ended.phase}"
        began, step = ("–" if value is None else str(value) for value in (ended.began, ended.step))
        return (
            f"| {number} | {self.ranks} | {self.threads} | {self.prefetch} | {began} | {step} | {how} | {ended.code} | {self.seconds:.0f} |"
        )


def live(argv: Sequence[str], out: Path, kills: int, num_steps: int, ranks: Sequence[int], seed: int) -> list[Attempt]:
    """Run it, end it so many times, and run it again until it is finished."""
    draw = random.Random(seed)
    found: list[Attempt] = []
    while not (out / RESULT).exists():
        left = kills - len(found)
        if left < -3:
            raise SystemExit(f"it does not come to an end:\n{found[-1].ended.text[-3000:]}")
        done = max((int(path.name.partition("-")[2]) for path in steps(out / "checkpoints")), default=0)
        at = done + draw.random() * 2 * (num_steps - done) / (left + 1) if left > 0 else 0.0
        how, rank, lot = draw.choice(SIGNALS), draw.choice((-1, 0, 1)), draw.random()
        early = Strike(how, -1, draw.random() * 6)
        strike = (early if lot < STARTING else Strike(how, min(int(at), num_steps - 1), draw.random() * 0.05, rank)) if left > 0 else None
        processes, threads, prefetch = draw.choice(ranks), draw.randint(1, 4), draw.randint(1, 6)
        began = time.monotonic()
        words = [*argv, f"out={out}", f"loader.num_threads={threads}", f"loader.prefetch={prefetch}"]
        found.append(Attempt(processes, threads, prefetch, strike, run_verb(words, strike, ranks=processes), time.monotonic() - began))
        print(found[-1].row(len(found)), flush=True)
    return found


def judge(quiet: Path, out: Path, uri: str, *, same_bits: bool, halves: bool) -> list[str]:
    """Lines that say what held; those that begin with `NOT` did not."""
    statuses, rows = rows_of(uri, out.name)
    _, known = rows_of(uri, quiet.name)
    lines = [held(statuses == ["FINISHED"], f"one tracked run, finished (found: {', '.join(statuses)})")]
    once = all(len({step for step, _ in points}) == len(points) for points in rows.values())
    count = sum(len(points) for points in rows.values())
    lines.append(held(once, f"one row for each key and step: {count} rows of {len(rows)} keys"))
    same_steps = {key: [step for step, _ in points] for key, points in rows.items()} == {
        key: [step for step, _ in points] for key, points in known.items()
    }
    lines.append(held(same_steps, "rows at the steps of the quiet run"))
    if same_bits:
        lines.append(held(rows == known, "every value in them is the quiet run's, bit for bit"))
        mine, its = tensors_of(out), tensors_of(quiet)
        lines.append(held(mine == its, f"bytes of {', '.join(its)} are the quiet run's"))
        return lines
    pairs = [(a, b) for (_, a), (_, b) in zip(rows["train/loss"], known["train/loss"], strict=False)]
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    lines.append(held(apart < 1e-5, f"loss curve within 1e-5 of the quiet run's: {apart:.1e} apart at most"))
    if tensors_of(out) == tensors_of(quiet):
        lines.append("weights and optimiser are the quiet run's, bit for bit")
    else:
        lines.append(held(not halves, f"weights {distance(out, quiet):.1e} of the largest apart at most"))
    return lines


def held(fine: bool, words: str) -> str:
    """A line of the judgement."""
    return words if fine else f"NOT: {words}"


def distance(out: Path, quiet: Path) -> float:
    """Largest difference of any two weights over the largest weight."""
    from safetensors.torch import load_file

    mine, its = (load_file(folder / "model" / "model.safetensors") for folder in (out, quiet))
    return max(float((mine[name] - its[name]).abs().max()) for name in its) / max(float(weight.abs().max()) for weight in its.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Live the day; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a tile store (default: a tiny one that is made, with a tiny recipe)")
    parser.add_argument("--kills", type=int, default=20, help="how often it is ended (20)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="numbers of processes that are drawn from (1)")
    parser.add_argument("--steps", type=int, default=TINY_STEPS, help=f"updates ({TINY_STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument("--out", type=Path, help="where both runs go (default: a new folder that is left)")
    parser.add_argument("settings", nargs="*", help="settings of pretrain as section.key=value")
    given = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="day-")) if given.out is None else given.out
    folder.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    if given.store is None:
        tiny = {"train__eval_steps": TINY_STEPS // 4, "train__checkpoint_steps": TINY_EVERY, "optim__base_lr": 0.01}
        tiny |= {"loader__micro_batch_size": TINY["loader.global_batch_size"] // 2}
        words = arguments(tiny_store(folder), folder, uri, **tiny)
    else:
        words = [f"store={given.store}", f"tracking.uri={uri}", "tracking.system_metrics=false", "train.precision=fp32", "train.device=cpu"]
    words = [word for word in words if not word.startswith("out=")] + [f"train.steps={given.steps}", *given.settings]
    quiet = run_verb([*words, f"out={folder / 'quiet'}"])
    if quiet.code:
        print(quiet.text)
        return 1
    print("| # | ranks | threads | ahead | from step | to step | ended by | exit code | seconds |\n|---|---|---|---|---|---|---|---|---|")
    attempts = live(words, folder / "day", given.kills, given.steps, given.ranks, given.seed)
    halves = given.store is None and max(given.ranks) <= 2
    lines = judge(folder / "quiet", folder / "day", uri, same_bits=set(given.ranks) == {1}, halves=halves)
    struck = sum(attempt.ended.code != 0 for attempt in attempts)
    print(f"\n{given.steps} steps in {len(attempts)} attempts, {struck} of them ended before their time ({folder}):")
    print("\n".join(f"- {line}" for line in lines))
    return int(any(line.startswith("NOT") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
