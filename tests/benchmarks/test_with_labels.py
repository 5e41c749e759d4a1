"""Codes made with labels: a planted factor is found in faint directions, the size is kept; a whole run on random arrays."""

import json
from pathlib import Path

import pytest
import torch
from base_and_mlp import train_base_and_mlp

from benchmarks.discriminant import DiscriminantConfig, discriminant, discriminants
from tvl_align.config import parse
from tvl_align.system.console import UserError


def test_the_documented_command_is_parsed() -> None:
    assert parse(DiscriminantConfig, ["demo/runs/base"]) == DiscriminantConfig(Path("demo/runs/base"))


def planted(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M, 20) noise of variance 25 in all directions but three, which tell two factors faintly."""
    draw = torch.Generator().manual_seed(seed)
    one, other = torch.randint(0, 2, (rows,), generator=draw), torch.randint(0, 3, (rows,), generator=draw)
    read = 5 * torch.randn(rows, 20, generator=draw)
    read[:, 3] = 0.3 * (2 * one - 1) + 0.05 * torch.randn(rows, generator=draw) + 7
    read[:, 4:6] = 0.2 * torch.eye(3)[other][:, :2] + 0.02 * torch.randn(rows, 2, generator=draw)
    return read, one, other


def test_factors_are_found_in_faint_directions_and_unknown_labels_are_left_out() -> None:
    read, one, other = planted(2000, 0)
    other[:500] = -1
    of = discriminants(read, [one, other], units=12, levels=3)
    fresh, one, other = planted(1000, 1)
    codes = of(fresh)
    assert codes.shape == (1000, 3)  # one direction of two levels, two of three
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    agreement = ((codes > 0) == (one == 1)[:, None]).float().mean(0)  # of each unit; the sign is free
    assert max(agreement.max(), 1 - agreement.min()) > 0.99
    distinct = {tuple(row) for level in range(3) for row in codes[other == level].mode(0).values[None].tolist()}
    assert len(distinct) == 3


def test_the_strongest_directions_fill_the_size_of_the_code() -> None:
    read, one, other = planted(2000, 0)
    read[:, 4:6] += 2 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))  # hides the second factor
    codes = discriminants(read, [other, one], units=1, levels=3)(read)
    assert codes.shape == (2000, 1)
    assert abs(float(((codes[:, 0] > 0) == (one == 1)).float().mean()) - 0.5) > 0.49


@pytest.mark.slow
def test_codes_of_a_run_hold_what_one_modality_owns(tmp_path: Path) -> None:
    runs = train_base_and_mlp(tmp_path)
    with pytest.raises(UserError, match="mlp is a run of stage2_mlp; give a run of base"):
        discriminant(DiscriminantConfig(runs / "mlp"))
    with pytest.raises(UserError, match="base have no factor that one modality alone owns"):
        discriminant(DiscriminantConfig(runs / "base"))
    legend = tmp_path / "store" / "labels.json"
    factors = json.loads(legend.read_text())
    factors["factors"]["side"]["ownership"] = ["touch"]
    legend.write_text(json.dumps(factors))
    path = discriminant(DiscriminantConfig(runs / "base"))
    assert path == runs / "base" / "discriminant.json"
    content = json.loads(path.read_text())
    assert content["summary"].keys() == {"unique_retention"}
    # zeros score 0; of the one unit with 3 levels the middle one tells nothing
    assert content["summary"]["unique_retention"]["score"] > 40
