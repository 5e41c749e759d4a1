"""A trained run <-> a folder to share: model.safetensors, config.json and a model card, README.md.

The folder holds numbers and text. Reading one executes and imports nothing that is in it or named by it, so it may come from
anyone.
"""

import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any, cast

import tyro
from torch import Tensor, nn

from tvl_align import __version__
from tvl_align.contract import FeatureSpec, Method
from tvl_align.data.tvl import is_synthetic
from tvl_align.encoders.tvl import FILE_ENCODERS
from tvl_align.evaluation.scores import mean_leak
from tvl_align.methods.registry import METHODS
from tvl_align.system.checkpoint import load_checkpoint, load_weights, save_weights
from tvl_align.system.console import UserError
from tvl_align.system.files import write_atomically
from tvl_align.training.engine import build_model
from tvl_align.training.run import Places, changed_options, load_run, read_config, specs_of
from tvl_align.training.settings import Settings

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1  # of config.json
MAX_CONFIG = 2**24  # bytes of a config.json
SYNTHETIC = "The data are synthetic: a world written by `tvl-align world`, with no real touch image, photo or caption."
UNKNOWN = "The data are not known to be synthetic or real."
EXAMPLES = {"vision": '["photo.jpg"]', "tactile": '["touch.png"]', "text": '["soft, woven"]'}


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained run as a folder to share: weights, config and model card."""

    run: tyro.conf.Positional[Path]
    """Run folder: <output_dir>/<log_name>."""
    out: Path
    """Folder to write: a new or empty one, or an earlier export of the same run, which is replaced."""
    checkpoint: str | None = None
    """Checkpoint in the run folder; default: the one that results.json measures, or checkpoint-acc1.pth without it."""
    licence: str | None = None
    """SPDX identifier of the licence of the weights, such as mit or cc-by-4.0; default: the card says that none is given."""
    method: str | None = None
    """Method of the run, as for train; default: the one stored in the run folder."""
    places: tyro.conf.OmitArgPrefixes[Places] = field(default_factory=Places)

    def __post_init__(self) -> None:
        if self.licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", self.licence):
            raise UserError(f"--licence {self.licence!r} is no SPDX identifier; give one such as mit or cc-by-4.0.")


def export(options: ExportConfig) -> Path:
    """Write model.safetensors, config.json and README.md of a run to the folder `out`; returns it.

    The folder appears when it is complete. Places of this machine are reduced to names. Raises UserError for a folder that
    is no run, weights that do not fit it, and an `out` that holds anything else than an earlier export of the run.
    """
    settings, method, recorded = load_run(options.run, options.method, options.places)
    results = _read_results(options.run / "results.json")
    name = options.checkpoint or str((results or {}).get("checkpoint", "checkpoint-acc1.pth"))
    checkpoint = load_checkpoint(options.run / name)
    specs = specs_of(settings, recorded)
    model_of(method, settings.knobs, specs, checkpoint["model"], options.run / name)  # weights that do not fit end here
    progress = checkpoint.get("progress") or {}
    config = {
        "format": FORMAT,
        **_without_places(recorded),
        "specs": {m: asdict(spec) for m, spec in specs.items()},
        "checkpoint": {"name": PurePath(name).name, "epoch": progress.get("epoch"), "step": progress.get("step", 0)},
        "synthetic": (settings.data.store is None and is_synthetic(settings.data.datasets_dir)) or None,  # None: not known
        "licence": options.licence.lower() if options.licence else None,
        "exported_by": __version__,
    }
    out = options.out.resolve()
    _check_free(out, config)
    card = model_card(config, results if results and _is_of(results, config, recorded) else None, out.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        save_weights(new / WEIGHTS, checkpoint["model"])
        write_atomically(new / CONFIG, json.dumps(config, indent=1, allow_nan=False) + "\n")
        write_atomically(new / CARD, card)
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    return options.out


def read_export(
    folder: Path, method: str | None = None, places: Places | None = None
) -> tuple[Settings[Any], Method, dict[str, Any], dict[str, Tensor]]:
    """Read a folder written by `export` -> settings, method, content of config.json, and weights.

    method: a value of `--method`. A method that does not ship with this package is imported only if it is given here, never
    because config.json names it; encoders of one's own of the form package.module:NAME are left out of the settings. places:
    of data, Stage 1 and stores; a Stage-1 checkpoint is looked for in the folder, under its recorded name.

    Raises UserError for a folder of another format, damaged files, numbers that are not finite, malformed sizes, and a
    method of another name or major version.
    """
    path, places = folder / CONFIG, places or Places()
    config = _read_json(path)
    if config.get("format") != FORMAT:
        found = f"format {str(config['format'])[:20]}" if "format" in config else "no format"
        raise UserError(
            f"{path} has {found}, and tvl-align {__version__} reads exports of format {FORMAT}; use the one that wrote it."
        )
    run = config["settings"].get("run") if isinstance(config.get("settings"), dict) else None
    named = run.get("method") if isinstance(run, dict) else None
    if method is None and named is not None and (not isinstance(named, str) or named not in METHODS):
        raise UserError(
            f"{folder} is of the method {str(named)[:100]!r}, and nothing is imported because a file names it; if you trust "
            "that module, give it by --method (method=)."
        )
    settings, of_run = read_config(config, path, method)
    if not isinstance(config["store"], str | None) or not isinstance(config.get("features", {}), dict):
        raise UserError(f"{path} has a malformed store or features; export the run again.")
    stage1, data, here = settings.stage1, settings.data, folder.resolve()
    modules = {f.name: None for f in fields(stage1) if f.name.endswith("_encoder") and _is_module(getattr(stage1, f.name))}
    more = tuple(x for x in stage1.more_encoders or () if not _is_module(x.partition("=")[2])) or None
    recorded = stage1.stage1_checkpoint or (Path("checkpoint.pth") if modules or more != stage1.more_encoders else None)
    file = places.stage1_checkpoint or (here / recorded.name if recorded is not None else None)
    settings = replace(
        settings,
        stage1=replace(stage1, stage1_checkpoint=file, more_encoders=more, **cast(Any, modules)),
        data=replace(
            data,
            datasets_dir=places.datasets_dir or data.datasets_dir,
            store=places.store or data.store,
            feature_dir=places.feature_dir or data.feature_dir,
        ),
        run=replace(settings.run, output_dir=here.parent, log_name=here.name),
    )
    specs_of(settings, {"specs": config.get("specs", {})})  # malformed sizes end here
    return settings, of_run, config, load_weights(folder / WEIGHTS)


def _is_module(encoder: str | None) -> bool:
    """True if the name of an encoder of one's own is package.module:NAME."""
    return encoder is not None and encoder.partition(":")[0] not in FILE_ENCODERS


def model_of(
    method: Method, knobs: Any, specs: Mapping[str, FeatureSpec], weights: Mapping[str, Tensor], path: Path
) -> nn.Module:
    """The model of a method with weights of the same names, shapes and types. Raises UserError, with `path`, for others."""
    try:
        model = build_model(method, knobs, specs)
        own = model.state_dict()
        other = [n for n, w in weights.items() if n in own and own[n].dtype != w.dtype]
        if other:
            raise TypeError(f"{other[0]} is {weights[other[0]].dtype}, not {own[other[0]].dtype}")
        model.load_state_dict(weights)
    except UserError:
        raise
    except Exception as error:  # sizes in a file from anyone may fail anywhere in a model
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the weights in {path} do not fit the settings beside it ({reason}); give those of one run."
        ) from error
    return model


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for anything else, such as NaN, which JSON does not have."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not an exported run (no {path.name}); give a folder written by tvl-align export.")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError(f"more than {MAX_CONFIG} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}); copy or write it again.") from error
    return content


def _read_results(path: Path) -> dict[str, Any] | None:
    return _read_json(path) if path.is_file() else None


def _is_of(results: Mapping[str, Any], config: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """True if the results are of the exported weights: of this run, this checkpoint, and, if they say it, this epoch."""
    was, checkpoint = results.get("run") or {}, config["checkpoint"]
    if was.get("store") != recorded["store"] or changed_options(was.get("settings") or {}, recorded["settings"]):
        return False
    if "progress" in results:
        return bool(results["progress"] == {name: checkpoint[name] for name in ("epoch", "step")})
    return bool(results.get("checkpoint") == checkpoint["name"])


def _without_places(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a run's config.json with names instead of places of the machine."""
    names = ("implementation", "store", "features", "rows", "version", "commit", "packages", "processes")
    kept = {name: recorded[name] for name in names if name in recorded}
    words = shlex.split(str(recorded.get("command", "")))
    return kept | {"settings": _named(recorded["settings"]), "command": shlex.join(_name(w, relative=True) for w in words)}


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _named(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_named(x) for x in value]
    return _name(value) if isinstance(value, str) else value


def _name(text: str, relative: bool = False) -> str:
    """The last part of an absolute path, also after `flag=` or `timm:NAME:`; with `relative`, of any path; else the text."""
    found = re.fullmatch(r"((?:.*[=:])?)((?:/(?!/)|~|\.\.?/).*)", text) or (
        relative and re.fullmatch(r"((?:.*=)?)([^:]*/.*)", text)
    )
    return found[1] + PurePath(found[2]).name if found else text


def _check_free(out: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError unless `out` can be written: it is new, empty, or an earlier export of the same run."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        inside = {path.name for path in out.iterdir()}
        if inside <= {WEIGHTS, CONFIG, CARD} and _which_run(_read_json(out / CONFIG)) == _which_run(config):
            return
    except (UserError, OSError, KeyError, TypeError):
        pass
    raise UserError(f"{out} exists and is not an earlier export of this run; give --out another folder.")


def _which_run(config: Mapping[str, Any]) -> tuple[Any, ...]:
    run = config["settings"]["run"]
    return config["format"], config["implementation"]["experiment_id"], config["store"], run["log_name"], run["seed"]


def model_card(config: Mapping[str, Any], results: Mapping[str, Any] | None, folder: str) -> str:
    """The model card of an export, in Markdown with the YAML front matter of Hugging Face.

    config: content of config.json. results: content of results.json, of the same weights; None: not evaluated. folder: name
    of the export, in the example of its use.
    """
    made_by, settings, specs = config["implementation"], config["settings"], config["specs"]
    synthetic, licence = config["synthetic"], config["licence"]
    tags = ["register-tokens", "multimodal", "representation-learning", *specs]
    tags += ["synthetic-data"] if synthetic else []
    front = [f"license: {json.dumps(licence or 'unknown')}", "library_name: tvl-align", "pipeline_tag: feature-extraction"]
    front += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    try:
        numbers = _numbers(results, specs) if results else [_not_evaluated(config)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"results.json was not written by this version ({type(error).__name__}: {error}); evaluate the run again."
        ) from error
    epochs = f"epoch {config['checkpoint']['epoch']} of {settings['optim']['epochs']}"
    lines = [
        *("---", *front, "---", "", SYNTHETIC if synthetic else UNKNOWN, ""),
        f"# {_plain(folder)}",
        "",
        f"Register tokens over frozen encoders: {_plain(made_by['experiment_id'])} {_plain(str(made_by['version']))}, for "
        f"{_listed(specs)}. Weights of {_code(config['checkpoint']['name'])}, {epochs}.",
        *("", "## Data", "", _data(config)),
        *("", "## Results", "", *numbers),
        *("", "## How it was made", "", "```bash", config["command"].replace("```", "'''") or "(not recorded)", "```", ""),
        f"Commit {_code(config.get('commit', 'unknown'))}, tvl-align {_plain(str(config.get('version', 'unknown')))}, seed "
        f"{settings['run']['seed']}. Names stand for places of the author's machine.",
        *("", "## Use", "", *_use(config, folder)),
        *("", "## Licence", ""),
        f"The weights: {licence}." if licence else "No licence was given: ask the author before you use the weights.",
        "The Stage-1 encoders and the data are not in this folder, and have licences of their own.",
        *("", "## Limits", "", *_limits(config, results)),
    ]
    return "\n".join(lines) + "\n"


def _data(config: Mapping[str, Any]) -> str:
    data = config["settings"]["data"]
    own = data["store"] or data.get("pairs")
    sets = f" ({_listed(data['datasets'])})" if not own else ""
    rows = ", ".join(f"{count} {name}" for name, count in config.get("rows", {}).items())
    shuffled = " It is a control: trained on random pairs." if data.get("shuffle_pairs") else ""
    name, key = PurePath(own or data["datasets_dir"]).name, config["store"] or "without a key"
    return f"{_code(name)}{sets}, rows: {rows or 'not recorded'}. Feature store {_code(key)}.{shuffled}"


def _numbers(results: Mapping[str, Any], specs: Mapping[str, Any]) -> list[str]:
    """Retrieval per pair, then retention and leak, with their 95% intervals."""
    lines = [
        f"Measured on {results['gallery']} {results['split']} rows ({results['groups']} independent groups). In brackets: "
        "95% interval over groups, of this one run.",
        *("", "| retrieval, % | Acc@1 | Acc@5 | chance (Acc@1) |", "|---|---|---|---|"),
    ]
    for pair, n in results["retrieval"].items():
        low_high = _interval(n["acc1"], n["low"], n["high"], 1)
        lines.append(
            f"| {_plain(pair.replace('_', '-'))} | {low_high} | {_number(n['acc5'], 1)} | {_number(n['chance1'], 2)} |"
        )
    if results.get("summary"):
        lines += ["", "By the strongest probe; 0 is chance, 100 the frozen features:", "", "| | score |", "|---|---|"]
        for name, s in results["summary"].items():
            lines.append(f"| {_plain(name.replace('_', ' '))} | {_interval(s['score'], s['low'], s['high'], 0)} |")
    read = {n: mean_leak(results.get("label_free", {}), n) for n in ("shared from complementary", "unique from overlapping")}
    if any(value is not None for value in read.values()):
        told = ", ".join(f"{name} {_number(value, 2)}" for name, value in read.items())
        lines += ["", f"Leak without labels (R2 of the strongest probe, 1 is everything): {told}."]
    return lines


def _not_evaluated(config: Mapping[str, Any]) -> str:
    return (
        "These weights were not evaluated. `tvl-align evaluate RUN --checkpoint "
        f"{_plain(config['checkpoint']['name'])}` measures them; export again to have the numbers here."
    )


def _use(config: Mapping[str, Any], folder: str) -> list[str]:
    stage1, specs, name = config["settings"]["stage1"], config["specs"], config["settings"]["run"].get("method")
    encoded = bool(config.get("features"))
    given = [json.dumps(folder)]
    given += [f"stage1_checkpoint={json.dumps(stage1['stage1_checkpoint'])}"] if stage1["stage1_checkpoint"] else []
    given += [f"method={json.dumps(name)}"] if name is not None and name not in METHODS else []
    inputs = ", ".join(f"{m}={EXAMPLES.get(m, json.dumps([f'a file of {m}']))}" for m in specs)
    if not encoded:
        inputs = ", ".join(f"{json.dumps(m)}: {re.sub(r'[^a-zA-Z_]', '_', m)}" for m in specs)
    lines = [
        "```python",
        *("import tvl_align", "", f"registers = tvl_align.load({', '.join(given)})"),
        f"out = registers.embed({inputs})"
        if encoded
        else f"out = registers.embed_features({{{inputs}}})  # (B, T, W) arrays",
        f"out.pooled[{json.dumps(next(iter(specs)))}]  # (B, D); tokens: out.overlapping, out.complementary",
        *("```", ""),
    ]
    if not encoded:
        shapes = ", ".join(f"{_plain(m)} (B, {s['tokens']}, {s['width']})" for m, s in specs.items())
        return [
            *lines,
            f"It was trained on imported features and has no Stage 1. It takes arrays of these shapes: {shapes}.",
        ]
    more = [x.partition("=")[2] for x in stage1.get("more_encoders") or ()]
    names = [stage1["stage1_checkpoint"], *(stage1.get(f"{m}_encoder") for m in specs), *more]
    fingerprint, file = config["features"].get("encoders", "unknown"), ", ".join(_code(name) for name in names if name)
    return [
        *lines,
        f"It needs the Stage 1 that it was trained with ({file}, fingerprint of its weights {_code(fingerprint)}). Any "
        "other is refused.",
    ]


def _limits(config: Mapping[str, Any], results: Mapping[str, Any] | None) -> list[str]:
    never = [
        "It is one run with one seed; other seeds were not measured for this card.",
        "Nothing was measured on data other than those above: other sensors, other objects, robots.",
    ]
    if config["synthetic"]:
        never.append("Nothing was measured on real touch, so not on the TVL data set.")
    else:
        never.append("Nothing is known to be measured on the TVL data set, unless the data above are it.")
    if results is None:
        never.append("Neither retrieval, retention nor leak was measured.")
    elif not results.get("summary"):
        never.append("Retention and leak of known factors were not measured.")
    if str(config.get("commit", "unknown")).endswith(("-dirty", "unknown")):
        never.append("The commit does not say exactly which code made it.")
    return [f"- {line}" for line in never]


def _interval(value: float | None, low: float | None, high: float | None, digits: int) -> str:
    if value is None or low is None or high is None:
        return _number(value, digits)
    return f"{value:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:z.{digits}f}"


def _listed(names: Any) -> str:
    return ", ".join(map(_plain, names))


def _code(text: object) -> str:
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def _plain(text: str) -> str:
    """Text without what Markdown or HTML would read as more than text."""
    return re.sub(r"[^\w .,:+-]", "?", text)
