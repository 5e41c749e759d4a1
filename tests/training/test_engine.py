"""The training loop: resuming, errors, selection and validation, on real features of a small synthetic data set."""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tvl_align.contract import Features, FeatureSpec, Stage2Model
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.base import Stage2Config, Stage2Loss, TVLStage2
from tvl_align.methods.registry import METHODS
from tvl_align.system.checkpoint import load_checkpoint, save_checkpoint
from tvl_align.system.console import UserError
from tvl_align.training import engine
from tvl_align.training.engine import evaluate, fit, selection_scores
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.run import Progress, Run, epoch_lines, remove_later_entries, strict
from tvl_align.training.settings import RunConfig, Settings

BASE = METHODS["base"]


@pytest.fixture
def settings(world: Path, stage1_checkpoint: Path, feature_dir: Path, tmp_path: Path) -> Settings[Stage2Config]:
    return Settings(
        Stage1Config(stage1_checkpoint),
        Stage2Config(register_token_dim=32, num_heads=4, drop_rate=0.1, components=32),
        DataConfig(world, views=1, feature_dir=feature_dir, num_workers=0),
        OptimConfig(batch_size=16, epochs=3, warmup_epochs=1, lr=1e-3),
        RunConfig(tmp_path / "runs", "one", device="cpu"),
    )


def changed(settings: Settings[Any], group: str, **values: Any) -> Settings[Any]:
    return replace(settings, **{group: replace(getattr(settings, group), **values)})


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([v.flatten() for v in load_checkpoint(folder / "checkpoint.pth")["model"].values()])


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_explains_itself(settings: Settings[Stage2Config], capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit(settings, BASE)
    assert folder == settings.folder
    config = json.loads((folder / "config.json").read_text())
    assert config["implementation"]["experiment_id"] == "stage2_base"
    assert {"settings", "store", "rows", "command", "commit", "packages", "processes"} <= config.keys()
    specs = settings.open_inputs(torch.device("cpu")).specs
    assert {name: FeatureSpec(**spec) for name, spec in config["specs"].items()} == specs
    assert list(config["specs"]) == list(specs) == ["vision", "tactile", "text"]
    rows = metrics(folder)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    named = ["total_loss", "overlapping_loss", "complementary_reg", "average_acc1", "average_acc5"]
    named += [f"{p}_{k}" for p in ("tactile_vision", "tactile_text", "text_vision") for k in ("loss", "acc1", "acc5")]
    for row in rows:
        assert {f"{split}_{name}" for split in ("train", "val") for name in named} | {"epoch", "lr"} <= row.keys()
    assert rows[-1]["train_total_loss"] < rows[0]["train_total_loss"]
    times = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    assert [row.pop("epoch") for row in times] == [0, 1, 2]
    assert all(row.keys() == {"train", "validate"} and min(row.values()) >= 0 for row in times)
    for name in ("checkpoint.pth", "checkpoint-acc1.pth", "checkpoint-acc5.pth"):
        content = load_checkpoint(folder / name)
        assert {"model", "progress", "implementation", "settings", "store"} <= content.keys()
        assert ("optimizer" in content) == (name == "checkpoint.pth")
    assert list(folder.glob("events.out.tfevents*"))
    said = capsys.readouterr().out
    assert f"[STAGE2] stage2_base v{BASE.implementation.version}" in said
    assert "(chance " in said


def test_same_seed_same_numbers_another_seed_others(settings: Settings[Stage2Config]) -> None:
    runs = [("a", 0, 0), ("b", 0, 2), ("c", 1, 0)]
    folders = [fit(changed(changed(settings, "run", log_name=n, seed=s), "data", num_workers=w), BASE) for n, s, w in runs]
    rows = [metrics(folder) for folder in folders]
    assert rows[0] == rows[1]
    assert torch.equal(weights(folders[0]), weights(folders[1]))
    assert rows[0] != rows[2]


def test_resume_ends_where_the_uninterrupted_run_ends(
    settings: Settings[Stage2Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimizer, random draws, dropout and best scores are those of an uninterrupted run."""
    whole = fit(settings, BASE)
    stopped = changed(settings, "run", log_name="stopped")
    record = Run.record

    def stop_after_the_second(self: Run, row: dict[str, Any], seconds: dict[str, float]) -> None:
        record(self, row, seconds)
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "record", stop_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, BASE)
    monkeypatch.undo()
    other = changed(changed(stopped, "optim", lr=2e-3), "data", num_workers=1)
    with pytest.raises(UserError, match=r"other settings: --lr 0\.002 \(it has 0\.001\); give these values"):
        fit(other, BASE)
    later = replace(BASE, implementation=replace(BASE.implementation, version=f"{BASE.implementation.version}9"))
    with pytest.raises(UserError, match=r"was trained by version [\d.]+ of stage2_base, and [\d.]+9 trains otherwise"):
        fit(stopped, later)
    with (stopped.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 2, "half": "an epoch that was never saved"}) + "\n")
    folder = fit(stopped, BASE)
    assert torch.equal(weights(folder), weights(whole))
    assert metrics(folder) == metrics(whole)
    assert load_checkpoint(folder / "checkpoint.pth")["progress"] == load_checkpoint(whole / "checkpoint.pth")["progress"]


def test_no_log_holds_an_epoch_twice_after_a_resume_of_an_earlier_checkpoint(
    settings: Settings[Stage2Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """times.jsonl, nonfinite.jsonl and TensorBoard are cut to the epoch of the checkpoint; metrics.jsonl is written anew."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    earlier, record = tmp_path / "earlier.pth", Run.record

    def keep_the_first(self: Run, row: dict[str, Any], seconds: dict[str, float]) -> None:
        record(self, row, seconds)
        if row["epoch"] == 0:
            shutil.copy(self.folder / "checkpoint.pth", earlier)

    monkeypatch.setattr(Run, "record", keep_the_first)
    folder = fit(settings, BASE)
    monkeypatch.undo()
    lines = [json.dumps({"epoch": epoch, "step": step}) for epoch, step in ((0, 5), (1, 0), (2, 3))]
    (folder / "nonfinite.jsonl").write_text("\n".join([*lines, '{"epoch": 0, "st']))
    fit(changed(settings, "run", resume=str(earlier)), BASE)
    assert [row["epoch"] for row in metrics(folder)] == [0, 1, 2]
    assert [json.loads(line)["epoch"] for line in (folder / "times.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert (folder / "nonfinite.jsonl").read_text() == lines[0] + "\n"
    events = EventAccumulator(str(folder)).Reload()
    for name in events.Tags()["scalars"]:
        assert [event.step for event in events.Scalars(name)] == [0, 1, 2]
    assert [event.value for event in events.Scalars("train/total_loss")] == pytest.approx(
        [row["train_total_loss"] for row in metrics(folder)]
    )


def test_within_an_epoch_the_steps_to_come_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "nonfinite.jsonl"
    entries = [{"epoch": epoch, "step": step} for epoch, step in ((1, 9), (2, 0), (2, 3), (2, 4), (3, 0))]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    remove_later_entries(path, Progress(epoch=2, step=4))
    assert [json.loads(line) for line in path.read_text().splitlines()] == entries[:3]
    path.write_text("".join(json.dumps({"epoch": epoch}) + "\n" for epoch in range(4)))
    remove_later_entries(path, Progress(epoch=2, step=4))
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]
    before = path.stat().st_ino
    remove_later_entries(path, Progress(epoch=2, step=0))
    assert path.stat().st_ino == before


@pytest.mark.parametrize("line", ['{"epoch": 0, "st', "[0, 1]", "7", "null", '"text"', '{"step": 1}', '{"epoch": "0"}', ""])
def test_a_line_that_is_no_entry_is_dropped(line: str, tmp_path: Path) -> None:
    path = tmp_path / "nonfinite.jsonl"
    path.write_text(f'{{"epoch": 0, "step": 1}}\n{line}\n')
    remove_later_entries(path, Progress(epoch=2, step=0))
    assert path.read_text() == '{"epoch": 0, "step": 1}\n'


def test_calibration_happens_once_and_not_on_resume(
    settings: Settings[Stage2Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first epoch, in evaluation mode, with all training rows without augmentation, twice over."""
    calls: list[list[int]] = []
    calibrate, record = TVLStage2.calibrate, Run.record

    def counted(self: TVLStage2, batches: Callable[[], Iterable[Features]]) -> None:
        assert not self.training and not torch.is_grad_enabled()
        calls.append([row for features in batches() for row in features.rows.tolist()])
        assert calls[-1] == [row for features in batches() for row in features.rows.tolist()]
        calibrate(self, batches)

    def stop_after_the_first(self: Run, row: dict[str, Any], seconds: dict[str, float]) -> None:
        record(self, row, seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(TVLStage2, "calibrate", counted)
    monkeypatch.setattr(Run, "record", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, BASE)
    monkeypatch.setattr(Run, "record", record)
    rows = len(settings.open_inputs(torch.device("cpu")).splits["train"])
    assert calls == [list(range(rows))]
    principal = load_checkpoint(settings.folder / "checkpoint.pth")["model"]["codes.principal.vectors_vision"]
    assert len(metrics(fit(settings, BASE))) == 3 and len(calls) == 1
    after = load_checkpoint(settings.folder / "checkpoint.pth")["model"]
    assert torch.equal(after["codes.principal.vectors_vision"], principal) and bool(after["codes.principal.fitted"])


def test_calibration_reads_evenly_spaced_rows(settings: Settings[Stage2Config], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    class Recorded(nn.Module, Stage2Model):
        def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
            found.extend(row for features in batches() for row in features.rows.tolist())

    source = settings.open_inputs(torch.device("cpu")).splits["train"]
    monkeypatch.setattr("tvl_align.training.engine.CALIBRATION_ROWS", len(source) // 4)
    engine.calibrate(Recorded(), source, torch.device("cpu"))
    assert found == list(range(0, len(source), found[1])) and len(source) // 5 <= len(found) <= len(source) // 4


def test_condensed_training_equals_training_on_tokens(
    settings: Settings[Stage2Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = changed(settings, "optim", epochs=1)
    condensed = metrics(fit(short, BASE))
    monkeypatch.setattr("tvl_align.features.store.MAX_CONDENSED", 0)
    tokens = metrics(fit(changed(short, "run", log_name="tokens"), BASE))
    for one, other in zip(condensed, tokens, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3) or "acc" in name, name


def test_the_best_so_far_survives_resume(settings: Settings[Stage2Config]) -> None:
    """A worse epoch after resuming does not replace the best checkpoint."""
    folder = fit(changed(settings, "optim", epochs=1), BASE)
    content = load_checkpoint(folder / "checkpoint.pth")
    content["progress"]["best"] = {"acc1": 99.0, "acc5": 99.0}
    save_checkpoint(folder / "checkpoint.pth", content)
    fit(changed(settings, "run", resume="auto"), BASE)
    assert load_checkpoint(folder / "checkpoint-acc1.pth")["progress"]["epoch"] == 1
    last = load_checkpoint(folder / "checkpoint.pth")["progress"]
    assert (last["epoch"], last["best"]) == (3, {"acc1": 99.0, "acc5": 99.0})


def test_the_best_checkpoints_hold_the_weights_of_their_epoch_only(
    settings: Settings[Stage2Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run dies between checkpoint.pth and the best checkpoint: the same command writes it."""
    scores = iter([{"acc1": 1.0, "acc5": 3.0}, {"acc1": 2.0, "acc5": 2.0}, {"acc1": 1.0, "acc5": 1.0}])
    monkeypatch.setattr(engine, "selection_scores", lambda validated: next(scores))
    write, saved = Run.write_derived, {}

    def dies_after_the_second(self: Run, model: nn.Module, progress: Progress) -> None:
        saved[progress.epoch] = {name: value.clone() for name, value in model.state_dict().items()}
        if progress.epoch == 2:
            raise KeyboardInterrupt
        write(self, model, progress)

    monkeypatch.setattr(Run, "write_derived", dies_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, BASE)
    monkeypatch.setattr(Run, "write_derived", write)
    folder = fit(settings, BASE)
    for name, epoch in (("acc1", 2), ("acc5", 1)):
        best = load_checkpoint(folder / f"checkpoint-{name}.pth")
        assert best.keys() == {"model", "progress", "implementation", "settings", "store"}
        assert best["progress"] == {"epoch": epoch, "step": 0}
        assert best["model"].keys() == saved[epoch].keys()
        assert all(torch.equal(best["model"][k], saved[epoch][k]) for k in saved[epoch])
    sizes = [(folder / f"checkpoint{name}.pth").stat().st_size for name in ("-acc1", "")]
    assert sizes[0] < 0.6 * sizes[1]
    assert not list(folder.glob("*.tmp"))


def test_a_run_does_not_resume_from_weights_alone(settings: Settings[Stage2Config]) -> None:
    folder = fit(changed(settings, "optim", epochs=1), BASE)
    best = folder / "checkpoint-acc1.pth"
    with pytest.raises(
        UserError, match=r"checkpoint-acc1\.pth has no optimizer state, .*; resume from the checkpoint\.pth of"
    ):
        fit(changed(settings, "run", resume=str(best)), BASE)
    best.unlink()
    (folder / best.name).hardlink_to(folder / "checkpoint.pth")  # as in run folders of earlier versions
    before = (folder / "checkpoint.pth").read_bytes()
    fit(changed(settings, "optim", epochs=1), BASE)
    assert (folder / "checkpoint.pth").read_bytes() == before
    fit(changed(settings, "run", resume=str(folder / "checkpoint.pth")), BASE)
    assert [row["epoch"] for row in metrics(folder)] == [0, 1, 2]


def test_resume_refuses_what_does_not_fit(settings: Settings[Stage2Config], tmp_path: Path) -> None:
    folder = fit(changed(settings, "optim", epochs=1), BASE)
    wider = changed(
        changed(settings, "knobs", register_token_dim=64), "run", log_name="x", resume=str(folder / "checkpoint.pth")
    )
    with pytest.raises(UserError, match="the checkpoint does not fit this model .*registers"):
        fit(wider, BASE)
    with pytest.raises(UserError, match="no such checkpoint"):
        fit(changed(settings, "run", resume=str(tmp_path / "none.pth")), BASE)


def test_a_loss_that_is_not_finite_stops_the_run(settings: Settings[Stage2Config]) -> None:
    good = fit(changed(settings, "optim", epochs=1), BASE)
    wild = changed(changed(settings, "optim", lr=1e30, warmup_epochs=0), "run", resume="auto")
    with pytest.raises(UserError, match=rf"the loss became .* in epoch 1, step \d+; the last good checkpoint is {good}"):
        fit(wild, BASE)


@pytest.mark.slow
def test_on_the_fly_trains_too(settings: Settings[Stage2Config]) -> None:
    live = changed(changed(settings, "data", views=0), "optim", epochs=1)
    assert math.isfinite(metrics(fit(live, BASE))[0]["val_total_loss"])


def test_two_modalities_and_pooled_features(settings: Settings[Stage2Config]) -> None:
    less = changed(changed(settings, "data", active_modality_names=("vision", "tactile")), "stage1", features="pooled")
    rows = metrics(fit(changed(less, "optim", epochs=1), BASE))
    assert "val_tactile_vision_acc1" in rows[0]
    assert not any("text" in name for name in rows[0])


def test_validation_is_one_gallery_whatever_the_batch(
    settings: Settings[Stage2Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retrieval metrics do not depend on the batch size of validation."""
    inputs = settings.open_inputs(torch.device("cpu"))
    torch.manual_seed(0)
    model, loss = BASE.model(settings.knobs, inputs.specs), Stage2Loss(preservation_weight=1.0)
    found = []
    for batch in (256, 3):
        monkeypatch.setattr("tvl_align.training.engine.EVAL_BATCH", batch)
        found.append(evaluate(model, loss, inputs.splits["test"], torch.device("cpu")))
    for name in (
        "tactile_vision_acc1",
        "text_vision_acc5",
        "tactile_text_loss",
        "tactile_text_chance1",
        "average_acc1",
    ):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name
    assert found[0]["tactile_vision_chance1"] == pytest.approx(100 / 24)


def test_a_pair_without_validation_rows_is_left_out_and_no_metric_is_nan(settings: Settings[Stage2Config]) -> None:
    inputs, cpu = settings.open_inputs(torch.device("cpu")), torch.device("cpu")
    source = inputs.splits["val"]
    torch.manual_seed(0)
    model, loss = BASE.model(settings.knobs, inputs.specs), BASE.loss(settings.knobs, list(inputs.specs))

    class WithoutText:
        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

        def __len__(self) -> int:
            return len(source)

        def batches(self, *args: Any) -> Iterable[Features]:
            for features in source.batches(*args):
                text = features.modalities["text"]
                absent = replace(text, present=torch.zeros_like(text.present))
                yield replace(features, modalities=features.modalities | {"text": absent})

    every, some = (evaluate(model, loss, s, cpu) for s in (source, WithoutText()))  # type: ignore[arg-type]
    assert some.keys() == {name for name in every if "text" not in name}
    assert some["average_acc1"] == some["tactile_vision_acc1"] == pytest.approx(every["tactile_vision_acc1"])
    assert all(math.isfinite(value) for value in some.values())
    assert strict({"a": math.nan, "b": 1.5, "c": 2}) == {"a": None, "b": 1.5, "c": 2}


def test_only_the_training_step_is_in_bf16(settings: Settings[Stage2Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: validation reads closed forms that were fitted in float32. Losses are close to those in float32.

    A small learning rate: 13 validation rows amplify what the optimizer makes of rounded gradients."""
    seen: set[tuple[bool, bool]] = set()

    def model(knobs: Stage2Config, specs: Any) -> nn.Module:
        built = TVLStage2.of(knobs, specs)
        built.register_forward_pre_hook(lambda module, _: seen.add((module.training, torch.is_autocast_enabled("cpu"))))
        return built

    exact = metrics(fit(changed(settings, "optim", epochs=1, lr=1e-4), BASE))[0]
    monkeypatch.setattr(engine, "training_precision", lambda device: torch.autocast(device.type, torch.bfloat16))
    rounded = metrics(
        fit(changed(changed(settings, "optim", epochs=1, lr=1e-4), "run", log_name="bf16"), replace(BASE, model=model))
    )[0]
    assert seen == {(True, True), (False, False)}
    assert rounded["train_total_loss"] != exact["train_total_loss"]
    for name in ("train_total_loss", "train_overlapping_loss", "val_total_loss"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.01), name


def test_the_best_checkpoint_ignores_the_pair_without_touch() -> None:
    """Acc@1 and Acc@5 are averaged over the pairs with touch; without touch, over all pairs."""
    scores = {
        f"{p}_{k}": v
        for p, v in (("tactile_vision", 2.0), ("tactile_text", 4.0), ("text_vision", 90.0))
        for k in ("acc1", "acc5")
    }
    assert selection_scores(scores) == {"acc1": 3.0, "acc5": 3.0}
    assert selection_scores({"text_vision_acc1": 7.0, "average_acc1": 7.0, "average_acc5": 8.0}) == {
        "acc1": 7.0,
        "acc5": 8.0,
    }


def test_accumulation_and_importance_sampling_run(settings: Settings[Stage2Config]) -> None:
    more = changed(changed(settings, "optim", accum_iter=2, epochs=1), "data", importance_sampling=True)
    assert math.isfinite(metrics(fit(more, BASE))[0]["train_total_loss"])


@pytest.mark.slow
def test_the_engine_takes_the_large_batch(settings: Settings[Stage2Config]) -> None:
    """4 parts of 4 rows and 1 part of 16 give the same numbers over two epochs."""
    rows = []
    for batch, parts in ((16, 1), (4, 4)):
        knobs = replace(settings.knobs, noise=0.0, input_dropout=0.0, nested_dropout_rate=0.0, drop_rate=0.0)
        optim = replace(settings.optim, batch_size=batch, accum_iter=parts, epochs=2, lr=1e-3)
        run = replace(settings.run, log_name=f"parts{parts}")
        rows.append(metrics(fit(replace(settings, knobs=knobs, optim=optim, run=run), BASE)))
    for one, other in zip(*rows, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3), name


@pytest.mark.slow
def test_compiled_training_gives_the_same_numbers(settings: Settings[Any]) -> None:
    """With an incomplete last batch, and validation, which is not compiled."""
    method = METHODS["cursor"]
    knobs = method.knobs(register_token_dim=32, num_heads=4)
    rows = []
    for compiled in (False, True):
        given = changed(changed(settings, "optim", epochs=1), "run", compile=compiled, log_name=f"compiled{compiled}")
        rows.append(metrics(fit(replace(given, knobs=knobs), method))[0])
    for name in rows[0]:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("part", ["settings", "progress", "implementation"])
def test_a_checkpoint_of_other_kinds_is_refused(settings: Settings[Any], part: str) -> None:
    folder = fit(changed(settings, "optim", epochs=1), BASE)
    save_checkpoint(folder / "checkpoint.pth", load_checkpoint(folder / "checkpoint.pth") | {part: 3})
    with pytest.raises(UserError, match="was not written by this version"):
        fit(changed(settings, "optim", epochs=1), BASE)


def test_the_lines_of_an_epoch_fit_120_columns() -> None:
    """The longest tag of a method, three modalities, and the largest values."""
    pairs = ("tactile_vision", "tactile_text", "text_vision")
    metrics = {"epoch": 99, "train_total_loss": 3.2129, "val_total_loss": 10.1011, "val_complementary_reg": 0.524}
    metrics |= {f"val_{pair}_{k}": 99.9 for pair in pairs for k in ("acc1", "acc5")}
    metrics |= {f"val_{pair}_chance1": chance for pair, chance in zip(pairs, (1.04, 10.26, 10.26), strict=True)}
    tag = f"[{METHODS['disentangled'].implementation.tag}] "
    lines = epoch_lines(metrics, 100, 1234.56)
    assert lines == [
        "epoch 100/100 | loss 3.213, val loss 10.101, val complementary reg 0.52 | 1234.6 s",
        "val Acc@1/5 %: tactile-vision 99.9/99.9, tactile-text 99.9/99.9, text-vision 99.9/99.9 (chance 1.0-10.3)",
    ]
    assert tag == "[DISENTANGLED] "
    assert all(len(tag + line) <= 120 for line in lines)


def test_the_lines_of_an_epoch_with_two_modalities() -> None:
    """Without a complementary loss, and with one chance level."""
    metrics = {"epoch": 0, "train_total_loss": 3.0, "val_total_loss": 2.5}
    metrics |= {"val_bottom_top_acc1": 12.0, "val_bottom_top_acc5": 40.06, "val_bottom_top_chance1": 2.0}
    assert epoch_lines(metrics, 1, 0.04) == [
        "epoch 1/1 | loss 3.000, val loss 2.500 | 0.0 s",
        "val Acc@1/5 %: bottom-top 12.0/40.1 (chance 2.0)",
    ]
