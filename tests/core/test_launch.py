"""What torchrun and Slurm leave in the environment becomes one rank of one job, or words on what is missing."""

from __future__ import annotations

import pytest

from mae_core.launch import Launch, LaunchError, first_node, launched

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "29400"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def test_torchrun_is_believed_also_inside_srun() -> None:
    known = Launch(5, 8, 1, "env://", "torchrun")
    assert launched(TORCHRUN) == known
    assert launched(TORCHRUN | SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}) == known


def test_a_process_of_its_own_on_each_machine_is_the_first_there() -> None:
    assert launched(without(TORCHRUN, "LOCAL_RANK")).local == 0


def test_tasks_of_srun_meet_on_the_first_node_at_a_port_of_the_step() -> None:
    found = launched(SRUN)
    assert (found.rank, found.world, found.local, found.by) == (5, 8, 1, "Slurm")
    host, port = found.address.removeprefix("tcp://").split(":")
    assert host == "gpu03"
    assert 20_000 <= int(port) < 30_000
    assert launched(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).address == found.address
    assert launched(SRUN | {"SLURM_STEP_ID": "3"}).address != found.address
    assert launched(SRUN | {"MASTER_ADDR": "ib-gpu03", "MASTER_PORT": "777"}).address == "tcp://ib-gpu03:777"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        without(SRUN, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST") | {"SLURM_PROCID": "0"},
    ],
    ids=["nothing", "torchrun", "srun with one task", "batch script of eight tasks"],
)
def test_one_process_stays_one(environment: dict[str, str]) -> None:
    assert launched(environment) == Launch()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            without(TORCHRUN, "WORLD_SIZE"),
            r"\(RANK, LOCAL_RANK, MASTER_ADDR set\), and WORLD_SIZE is missing .* or unset",
        ),
        (without(TORCHRUN, "RANK"), r"RANK is missing"),
        (without(TORCHRUN, "MASTER_PORT"), r"MASTER_PORT is missing"),
        (TORCHRUN | {"RANK": "8"}, r"RANK=8 and WORLD_SIZE=8 in the environment: a rank lies below"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, r"WORLD_SIZE=many in the environment is no number"),
        (without(SRUN, "SLURM_PROCID"), r"SLURM_PROCID is missing"),
        (without(SRUN, "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"), r"SLURM_JOB_NODELIST is missing"),
        (without(SRUN, "SLURM_LOCALID"), r"SLURM_LOCALID is missing"),
    ],
)
def test_half_a_launch_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        launched(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("cpu1,gpu[03-05]", "cpu1"),
        ("rack[1-2]node[07,09]", "rack1node07"),
        ("a-b[1]", "a-b1"),
        ("gpu[7,3-5]x,b", "gpu7x"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_list_without_a_name_is_told() -> None:
    with pytest.raises(LaunchError, match=r"list of nodes ',x' begins with no name; set MASTER_ADDR"):
        first_node(",x")
