"""The fault campaign in short: each fault a few times. `make faults` makes all of them, many times."""

from collections.abc import Callable
from pathlib import Path

import bad_inputs
import faults
import pytest
from faults import Ground

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def ground(once: Callable[..., Path], world: Path, stage1_checkpoint: Path) -> Ground:
    """The session's data and Stage 1 where the campaign looks for them, and the uninterrupted run that others must equal."""

    def make(root: Path) -> None:
        root.mkdir()
        (root / "world").symlink_to(world)
        (root / "stage1").symlink_to(stage1_checkpoint.parent)
        faults.whole_run(Ground.prepare(root))

    return Ground(once("faults", make))


def test_a_killed_training_goes_on_to_the_same_weights(ground: Ground) -> None:
    outcome = faults.killed_training(ground, 3)
    assert not outcome.lost, outcome


def test_a_killed_encode_goes_on_to_the_same_store(ground: Ground) -> None:
    outcome = faults.killed_encode(ground, 1)
    assert not outcome.lost, outcome


def test_a_training_that_is_told_to_end_loses_no_step(ground: Ground) -> None:
    outcome = faults.told_to_end(ground, 2)
    assert not outcome.lost, outcome


def test_a_full_disk_costs_nothing_that_was_there(ground: Ground) -> None:
    outcome = faults.full_disk(ground)
    assert not outcome.lost, outcome
    assert "free some space" in outcome.outcome


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_dead_process_ends_the_others_or_all_start_again(ground: Ground, restarts: int) -> None:
    outcome = faults.dead_rank(ground, 2, restarts)
    assert not outcome.lost, outcome


def test_two_at_once_tear_nothing(ground: Ground) -> None:
    outcome = faults.races(ground, 2)
    assert not outcome.lost, outcome


def no_loss(outcome: faults.Outcome) -> None:
    if outcome.outcome.startswith(faults.SKIPPED):
        pytest.skip(outcome.outcome)
    assert not outcome.lost, outcome


@pytest.mark.parametrize("ability", ["locks", "maps"])
def test_a_file_system_that_lacks_an_ability_costs_nothing(ground: Ground, ability: str) -> None:
    no_loss(faults.without(ground, ability))


def test_little_shared_memory_costs_nothing_but_time(ground: Ground) -> None:
    no_loss(faults.small_shared_memory(ground))


def test_a_dead_process_that_loads_images_ends_the_job_in_one_sentence(ground: Ground) -> None:
    no_loss(faults.dead_loader(ground))


def test_files_from_strangers_are_refused_and_nothing_of_theirs_runs(ground: Ground) -> None:
    outcome = faults.strangers(ground)
    assert not outcome.lost, outcome


def test_numbers_gone_bad(ground: Ground) -> None:
    outcome = faults.gone_bad(ground)
    assert not outcome.lost, outcome


def test_same_seed_same_metrics(ground: Ground) -> None:
    outcome = faults.reproducible(ground)
    assert not outcome.lost, outcome


def test_mutated_files_are_read_or_refused(ground: Ground) -> None:
    outcome = faults.fuzzed(ground, 5)
    assert not outcome.lost, outcome


def test_bad_inputs_are_used_left_out_or_refused(ground: Ground) -> None:
    outcome = bad_inputs.all_of_them(ground.root, ground.checkpoint)
    assert outcome.times >= 30
    assert not outcome.lost, outcome
