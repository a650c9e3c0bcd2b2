"""The table of injected faults: what is injected, what is expected, and which tests show it.

    python -m tests.faults.faults [--file TABLE.md] [--only NUMBER ...]

runs the tests of all faults, the long ones too, and prints the table with what happened. Exit code 1 if a test failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        number: In the list that a release is judged by.
        injected: What is done to the system.
        expected: What it has to do then.
        tests: `file::function` that show it.
        exception: Why nothing does on this machine; empty where something does.
    """

    number: int
    injected: str
    expected: str
    tests: tuple[str, ...]
    exception: str = ""


def _tests(file: str, *functions: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::test_{name}" for name in functions)


FAULTS: tuple[Fault, ...] = (
    Fault(
        1,
        "SIGKILL at a random step, 20 seeds, other threads each time",
        "goes on and ends in the bits of an undisturbed run: weights, optimiser, random state, metric rows",
        _tests("faults/test_killed", "killed_at_a_random_step_it_ends_in_the_bits_of_the_undisturbed_run", "another_step_is_other_bits")
        + _tests("pipelines/test_pretrain", "killed_and_run_again_it_ends_in_the_same_bytes_as_one_run"),
    ),
    Fault(
        2,
        "SIGKILL at every stage of a save",
        "the newest checkpoint always loads; leftovers go at the next start",
        _tests(
            "core/test_checkpoint_writer",
            "killed_at_every_stage_of_a_save_the_pointer_names_a_whole_one",
            "what_a_kill_left_is_gone_at_the_next_start",
        ),
    ),
    Fault(
        3,
        "SIGTERM or SIGUSR1 in every part of a step, in evaluation, in a save, before and after the loop",
        "one whole checkpoint at the next boundary, exit code 75, run KILLED",
        _tests(
            "core/test_stopping",
            "a_signal_anywhere_in_a_step_stops_at_its_end_and_nothing_is_lost",
            "outside_of_the_loop_the_first_signal_ends_the_work_and_the_next_change_nothing",
        )
        + _tests("pipelines/test_stopping_verbs", "a_pretraining_that_is_stopped_again_and_again_gets_done")
        + _tests("core/test_watchdog", "where_one_of_two_processes_is_asked_both_stop_at_the_same_step"),
    ),
    Fault(
        4,
        "a second SIGTERM while the first is answered",
        "changes nothing: the save is whole, the exit code stays",
        _tests(
            "core/test_stopping",
            "a_signal_anywhere_in_a_step_stops_at_its_end_and_nothing_is_lost",
            "forked_children_are_not_disturbed_and_the_exit_code_is_not_changed_by_later_signals",
        ),
    ),
    Fault(
        5,
        "one of two processes killed",
        "the other ends with an error that names it; the next attempt finishes",
        _tests("pipelines/test_lost_rank", "the_survivor_names_the_dead_and_another_go_finishes")
        + _tests(
            "core/test_lost_ranks",
            "the_lost_one_is_named_with_its_step_and_ours",
            "where_python_hears_of_nothing_a_thread_ends_the_process",
        ),
    ),
    Fault(
        6,
        "one process hangs in a step",
        "stacks of all threads are written and the job ends within the budget",
        _tests(
            "core/test_watchdog",
            "a_hung_process_is_named_with_its_place_and_ends_the_job",
            "where_a_library_holds_the_lock_of_the_interpreter_a_timer_ends_the_process",
        ),
    ),
    Fault(
        7,
        "gone on with on 1, 2 and 1 processes and with other numbers of threads",
        "the same samples in the same order; loss curve within 1e-5",
        _tests("faults/test_killed", "from_one_process_to_two_and_back_it_is_the_same_curve")
        + _tests("core/test_equality", "any_number_of_processes_sees_the_same_samples_and_gives_the_same_curves")
        + _tests(
            "core/test_loader", "the_processes_share_each_step_whatever_their_number", "threads_prefetch_and_micro_batches_change_nothing"
        ),
    ),
    Fault(
        8,
        "a flipped bit in weights, optimiser or manifest of the newest checkpoint",
        "the file is named, the one before is taken; an error where none is sound",
        _tests(
            "core/test_checkpoint",
            "a_damaged_checkpoint_is_named_and_the_one_before_it_taken",
            "where_none_is_sound_the_run_does_not_start_over_in_silence",
        ),
    ),
    Fault(
        9,
        "a checkpoint cut short, empty, or without one of its files",
        "as 8",
        _tests(
            "core/test_checkpoint",
            "a_damaged_checkpoint_is_named_and_the_one_before_it_taken",
            "a_manifest_that_vouches_for_nothing_is_no_manifest",
        ),
    ),
    Fault(
        10,
        "the disk is full during a save",
        "the checkpoint before is untouched; the message says what to do",
        _tests(
            "core/test_checkpoint_writer",
            "a_full_disk_is_told_and_the_checkpoint_before_is_untouched",
            "a_limit_that_the_system_sets_leaves_the_one_before",
        ),
    ),
    Fault(
        11,
        "the disk is full while tiles are cut",
        "can be gone on with; no half-written tile counts",
        _tests("pipelines/test_preparation_resume", "a_full_disk_is_said_before_and_during"),
    ),
    Fault(
        12,
        "a chunk of a store deleted, cut short, or with a flipped bit",
        "refused with array and chunk by name; no zeros are trained on",
        _tests(
            "core/test_store",
            "a_flipped_bit_is_refused_by_name",
            "a_truncated_shard_is_refused",
            "a_missing_shard_is_refused_by_name",
            "a_chunk_left_out_of_its_shard_is_no_zeros",
        )
        + _tests("core/test_loader", "a_changed_chunk_stops_the_stream_and_is_named"),
    ),
    Fault(
        13,
        "a worker of a preparation dies between any two writes",
        "the next run ends in the bytes of an undisturbed one",
        _tests(
            "pipelines/test_preparation_resume",
            "stopped_at_any_write_it_ends_in_the_same_bytes",
            "killed_with_dask_and_run_again_it_ends_in_the_same_bytes",
        )
        + _tests("pipelines/test_preparation_workers", "a_worker_killed_in_the_middle_of_a_task_leaves_no_trace_in_the_store"),
    ),
    Fault(
        14,
        "damaged or senseless scans and images",
        "left out with the reason and counted; too many of them stop the work",
        _tests(
            "pipelines/test_preparation",
            "a_damaged_scene_is_quarantined_and_counted",
            "too_many_damaged_scenes_stop_it_and_mended_ones_are_read_again",
            "it_stops_as_soon_as_too_many_scenes_have_failed",
        ),
    ),
    Fault(
        15,
        "the tracking server is away, slow or failing at the start, in the middle, at the end",
        "training goes on without an error; what was told is there later, once",
        _tests(
            "core/test_outage",
            "through_an_outage_a_run_goes_on_and_is_told_later_as_it_was",
            "killed_in_the_middle_of_telling_it_is_told_once",
            "cut_off_and_gone_on_with_it_is_one_run_with_one_row_a_step",
        ),
    ),
    Fault(
        16,
        "eight processes begin at once on a fresh SQLite file",
        "all succeed",
        _tests("core/test_tracking", "processes_that_make_a_new_store_at_once_all_succeed"),
    ),
    Fault(
        17,
        "two jobs go on with one run",
        "the second is refused, or takes it over when told to",
        _tests(
            "pipelines/test_lease",
            "the_second_of_two_jobs_is_told_who_has_the_run_and_a_killed_one_blocks_nobody",
            "a_job_whose_run_is_taken_over_notices_and_the_heir_keeps_the_run",
            "no_checkpoint_is_written_after_a_takeover",
        ),
    ),
    Fault(
        18,
        "a batch that is not finite; a learning rate that explodes",
        "skipped and counted; after so many in a row a stop with the tiles by number, weights finite",
        _tests(
            "core/test_divergence",
            "a_skipped_step_is_as_if_it_had_had_no_update",
            "so_many_in_a_row_stop_the_run_and_are_named",
            "a_rate_that_explodes_leaves_finite_weights",
        )
        + _tests("pipelines/test_replay", "a_run_that_diverges_leaves_a_box_that_gives_the_same_again"),
    ),
    Fault(
        19,
        "a worker of a preparation killed for its memory; memory that runs out in a loader",
        "an error that names scenes or tiles and the setting; no hang",
        _tests("faults/test_memory", "memory_that_runs_out_in_a_loader_is_told_and_the_run_goes_on_with_less")
        + _tests("pipelines/test_preparation_resume", "a_worker_that_dies_is_said_with_its_scenes"),
    ),
    Fault(
        20,
        "the clock jumps a day back and the time zone changes",
        "steps, checkpoints that stay and the rows of a run are as without it",
        _tests("faults/test_killed", "a_clock_that_jumps_back_and_another_time_zone_change_nothing")
        + _tests("core/test_checkpoint_writer", "what_stays_does_not_depend_on_the_clock")
        + _tests("pipelines/test_lease", "machines_clocks_do_not_count"),
    ),
    Fault(
        21,
        "a checkpoint of an older format",
        "loads and goes on, or names the migration",
        _tests(
            "core/test_checkpoint",
            "a_checkpoint_of_format_1_is_brought_to_today_by_a_named_migration",
            "a_later_format_is_refused_with_what_to_do",
        ),
    ),
    Fault(
        22,
        "a folder that takes no file, a full disk, spaces and other letters, names that are too long",
        "told before the work begins",
        _tests(
            "pipelines/test_doctor",
            "a_folder_that_can_be_made_is_fine_whatever_its_letters",
            "a_name_that_is_too_long_is_told",
            "a_folder_that_cannot_be_written_to_is_told",
            "little_room_and_few_files_left_are_told",
        ),
    ),
    Fault(
        23,
        "SIGKILL between the export of a model and the move of its alias",
        "the alias names the old version; the next attempt moves it, and the version is made once",
        _tests("faults/test_killed", "killed_before_the_alias_moves_it_names_the_old_version_and_the_next_attempt_completes"),
    ),
    Fault(
        24,
        "memory of a GPU that runs out at some step",
        "a message with shapes and a smaller batch; no state is spoiled",
        _tests(
            "core/test_exhaustion",
            "a_smaller_micro_batch_is_suggested_and_does_it",
            "where_one_sample_does_not_fit_another_model_is_suggested",
        ),
        "shown with the error of a GPU raised by the test: not run on a GPU",
    ),
)


class Outcomes:
    """A plugin that counts how the tests of each function ended."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, int]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test: failed wherever it failed, else passed or skipped."""
        if report.when == "call" or report.outcome != "passed":
            counts = self.found.setdefault(report.nodeid.partition("[")[0], {})
            counts[report.outcome] = counts.get(report.outcome, 0) + 1

    def of(self, fault: Fault) -> dict[str, int]:
        """How the tests of a fault ended, by outcome."""
        total: dict[str, int] = {}
        for name in fault.tests:
            for outcome, count in self.found.get(name, {"not run": 1}).items():
                total[outcome] = total.get(outcome, 0) + count
        return total


def happened(fault: Fault, counts: dict[str, int]) -> str:
    """What happened, in few words."""
    tests = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items(), key=lambda item: (item[0] != "failed", item[0])))
    return "; ".join(part for part in (f"as expected ({tests})" if set(counts) == {"passed"} else tests, fault.exception) if part)


def table(faults: Sequence[Fault], outcomes: Outcomes) -> str:
    """The table in Markdown."""
    rows = [f"| {fault.number} | {fault.injected} | {fault.expected} | {happened(fault, outcomes.of(fault))} |" for fault in faults]
    return "\n".join(("| # | injected | expected | what happened |", "|---|---|---|---|", *rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="where the table goes too")
    parser.add_argument("--only", type=int, nargs="+", default=[], help="numbers of faults (default: all)")
    given = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if not given.only or fault.number in given.only]
    outcomes = Outcomes()
    names = sorted({name for fault in chosen for name in fault.tests})
    code = pytest.main(["-q", "-m", "", "--rootdir", str(ROOT), *(str(ROOT / name) for name in names)], plugins=[outcomes])
    text = table(chosen, outcomes)
    print(text)
    if given.file is not None:
        given.file.write_text(text + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
