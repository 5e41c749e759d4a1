"""A trained run as a tool: pictures and sentences, or features of one's own -> tokens.

    registers = tvl_align.load("output_dir/mine")
    out = registers.embed(vision=["a.jpg"], tactile=["t.png"], text=["soft, woven"])  # depth=["d.png"], of a run with depth
    out.pooled["tactile"]

Inputs are treated as in training: the run knows the transforms of pictures, the prompt, and which Stage 1 made its features.

Shapes: B rows, N = No + Nc registers, D their width, T tokens of a modality.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tvl_align.config import from_plain
from tvl_align.contract import MODALITIES, Features, FeatureSpec, Method, Tokens
from tvl_align.data.further import FurtherInput, further_inputs
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.pictures import BadImage, Touch
from tvl_align.data.text import adjectives, evaluation_text, is_absent
from tvl_align.data.transforms import picture_tensor
from tvl_align.data.tvl import PICTURES
from tvl_align.encoders.own import load_encoders
from tvl_align.encoders.tvl import Precision, Stage1
from tvl_align.features.identity import precision_of
from tvl_align.features.store import FeatureSource, FeatureStore
from tvl_align.inference.export import CARD, CONFIG, WEIGHTS, ExportConfig, export, model_of, read_export
from tvl_align.losses.alignment import pair_name
from tvl_align.registers.attention import attention_maps
from tvl_align.registers.nested import prefix
from tvl_align.registers.pooling import pooled_overlapping
from tvl_align.system.checkpoint import load_checkpoint
from tvl_align.system.console import UserError, progress
from tvl_align.system.runtime import pick_device
from tvl_align.system.workers import run_in_threads
from tvl_align.training.run import Places, load_run, specs_of
from tvl_align.training.settings import Settings

BATCH = 64  # rows
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Picture = str | Path | Image.Image | np.ndarray | Tensor | Touch


@dataclass(frozen=True)
class Embeddings:
    """The tokens of B rows, on the CPU, float32.

    overlapping: {modality: (B, No, D)}. complementary: {modality: (B, Nc, D)}. pooled: {modality: (B, D)}, of unit norm: the
    mean of the overlapping tokens, for retrieval. present: {modality: (B,) bool}; vectors of absent rows are zero.
    attention: {modality: (B, N, T)} if it was asked for, else empty; see `Registers.embed`.
    """

    overlapping: dict[str, Tensor]
    complementary: dict[str, Tensor]
    pooled: dict[str, Tensor]
    present: dict[str, Tensor]
    attention: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    @classmethod
    def joined(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """The rows of several embeddings of the same modalities, one after the other."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{name: {m: torch.cat([part[m] for part in of]) for m in of[0]} for name, of in columns.items()})


class Registers:
    """The registers of a trained run, with what they need to embed new inputs.

    model: in evaluation mode on `device`. specs: {modality: shapes of the frozen features}. count: N. config: the content of
    config.json. Made by `load`.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, FeatureSpec],
        method: Method,
        settings: Settings[Any],
        config: Mapping[str, Any],
        folder: Path,
        device: torch.device,
        checkpoint: str,
        stage1: Stage1 | None = None,
    ) -> None:
        self.model, self.specs, self.method = model.to(device).eval(), dict(specs), method
        self.settings, self.config, self.folder, self.device = settings, dict(config), folder, device
        self.checkpoint = checkpoint
        self.count, self._stage1 = len(model.get_parameter("registers")), stage1

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of the run."""
        return tuple(self.specs)

    @cached_property
    def key(self) -> str:
        """What the tokens depend on beside the inputs: method, version, a hash of the weights, and the feature store."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        made_by = self.config["implementation"]
        return f"{made_by['experiment_id']} {made_by['version']} {digest.hexdigest()[:12]} on {self.config['store']}"

    @cached_property
    def stage1(self) -> Stage1:
        """The frozen encoders of the run, loaded on first use.

        Raises UserError if the run was trained on features of one's own, if there is no checkpoint, and for a checkpoint of
        other weights than those that the run was trained with.
        """
        if self._stage1 is not None:
            return self._checked(self._stage1, "the Stage 1 that was given").to(self.device)
        frozen, names = replace(self.settings.stage1, encode_precision=self.precision), self.modalities
        lacking = [m for m in names if frozen.encoder_of(m) is None]
        if further := [m for m in lacking if m not in MODALITIES]:
            raise UserError(
                f"{self.folder} gives no encoder of {further[0]}, as nothing is imported because a file names it; give the "
                "encoders of the run, load(..., stage1=), see tvl_align.encoders.own.load_encoders."
            )
        if frozen.stage1_checkpoint is None and lacking:
            raise UserError(
                f"{self.folder} does not say where its Stage 1 is; give --stage1_checkpoint (stage1_checkpoint=)."
            )
        what = str(frozen.stage1_checkpoint or "the encoders of the run")
        return self._checked(load_encoders(frozen, names, self.folder), what).to(self.device)

    @property
    def precision(self) -> Precision:
        """The precision of the encoders that the run was trained with, on any device."""
        return precision_of(self._ingredients)

    def _checked(self, stage1: Stage1, what: str) -> Stage1:
        expected, found = self._ingredients.get("encoders"), stage1.fingerprint()
        if expected != found:
            raise UserError(
                f"{what} has the weights {found[:12]}, but {self.folder} was trained with {str(expected)[:12]}; give the "
                "Stage-1 checkpoint of that run."
            )
        return stage1

    @property
    def _ingredients(self) -> Mapping[str, Any]:
        """What the features of the run depend on (tvl_align.features.identity). Raises UserError for own features."""
        found = self.config.get("features") or {}
        if not found and (self._store_folder / "manifest.json").is_file():  # a run of an earlier version
            found = FeatureStore(self._store_folder).manifest["ingredients"]
        if not found:
            raise UserError(
                f"{self.folder} was trained on features of your own, and does not know what made them; give features to "
                "embed_features."
            )
        return found

    @cached_property
    def image_options(self) -> ImageOptions:
        """What is done to a picture: that of the run."""
        return from_plain(ImageOptions, self._ingredients["images"])

    @cached_property
    def further(self) -> dict[str, FurtherInput]:
        """{further modality: what makes its inputs}."""
        return further_inputs(self.stage1.further, self.image_options.more_bits)

    def takes_pictures(self, modality: str) -> bool:
        """Whether the items of a modality are pictures; those of a further one may be anything that its encoder reads."""
        return modality in PICTURES or (modality not in MODALITIES and self.stage1.takes_pictures(modality))

    def embed(
        self,
        vision: Sequence[Picture | None] | Picture | None = None,
        tactile: Sequence[Picture | None] | Picture | None = None,
        text: Sequence[str | None] | str | None = None,
        *,
        keep: int | None = None,
        attention: bool = False,
        sentences: bool | None = None,
        dataset: str | None = None,
        batch_size: int = BATCH,
        precision: Precision | None = None,
        quiet: bool = True,
        **more: Any,
    ) -> Embeddings:
        """Embed pictures, sentences and items of further modalities: B per modality, None where a row lacks one.

        vision, tactile: paths, PIL images, arrays or tensors, see `tvl_align.data.transforms.picture_tensor`; a touch image
        may be a `tvl_align.data.pictures.Touch`, with an earlier frame, and with the image without contact that the run
        subtracts. text: captions of adjectives, "soft, woven", which get the prompt of the run. more: further modalities by
        name, depth=["d.png"]: pictures, or what the `transform` of their encoder takes. One item alone is a batch of one.
        Modalities that are not given are not in the result.

        keep: only the first `keep` registers; the others are zero. sentences: whether texts are sentences, used as they are;
        default: as in the run. dataset: of runs on TVL's data, whose photos are cropped as in this data set: "ssvtp"
        (centre), "hct" (top) or "hct/data3"; default: by the place of a file in the data folder of the run, else the
        centre. precision: of the encoders, float32, bf16 or fp16; default: that of the run. quiet: no progress.

        attention: also compute how much each frozen token moves each register, (B, N, T), of sum 1 over T: the norm of the
        gradient of the register's squared norm, halved. It holds for every method, also for those that read tokens through
        principal components. Tokens are the pooled one, then the 4 x 4 grid of patches, row by row.

        Raises UserError for inputs that cannot be used, with the number of the item and the reason.
        """
        given = {"vision": vision, "tactile": tactile, "text": text, **more}
        given = {m: x for m, x in given.items() if x is not None}
        self._check_known(given)
        items = {m: _as_list(m, x, m == "text" or self.takes_pictures(m)) for m, x in given.items()}
        rows = self._rows(items)
        check_keep(keep, self.count)
        if sentences is None and text is not None:
            sentences = bool(self._ingredients["text"].get("sentences", False))
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is out of range; give 1 or more.")
        self.stage1  # noqa: B018 - loaded before threads use it
        used = precision or self.precision
        batches = [range(i, min(i + batch_size, rows)) for i in range(0, rows, batch_size)]

        def one(batch: range) -> Embeddings:
            of_batch = {m: x[batch.start : batch.stop] for m, x in items.items()}
            features = self._encode(of_batch, batch, bool(sentences), dataset, used)
            return self.embed_features(features, keep=keep, attention=attention)

        parts: list[Embeddings] = []
        lanes = torch.get_num_threads() if self.device.type == "cuda" else None  # a GPU waits for pictures to be read
        if len(batches) == 1:
            lanes = 1  # which then has all threads
        with progress(rows, "embed", "row", quiet) as bar:
            for part in run_in_threads((partial(one, batch) for batch in batches), lanes):
                parts.append(part)
                bar.update(len(part))
        return Embeddings.joined(parts)

    def _check_known(self, given: Mapping[str, Any]) -> None:
        unknown = [m for m in given if m not in self.specs]
        if unknown:
            raise UserError(f"this run has no modality {unknown[0]!r}; it has {', '.join(self.specs)}.")

    def _rows(self, items: Mapping[str, Sequence[Any]]) -> int:
        self._check_known(items)
        lengths = {m: len(x) for m, x in items.items()}
        if not lengths or 0 in lengths.values():
            raise UserError(f"there is nothing to embed; give items of one of {', '.join(self.specs)}.")
        if len(set(lengths.values())) > 1:
            raise UserError(
                f"the modalities differ in their rows, {lengths}; give each the same number, None where one lacks it."
            )
        return next(iter(lengths.values()))

    def _encode(
        self, items: Mapping[str, Sequence[Any]], batch: range, sentences: bool, dataset: str | None, precision: Precision
    ) -> Features:
        """The frozen features of a batch of items, at the precision of a feature store."""
        stage1, device = self.stage1, self.device
        raw: dict[str, Any] = {}
        for m, of_batch in items.items():
            if m == "text":
                prompt = None if sentences else str(self._ingredients["text"]["prompt"])
                raw[m] = stage1.tokenize([_sentence(x, prompt, i) for x, i in zip(of_batch, batch, strict=True)]).to(device)
            else:
                inputs = [self._input(x, m, dataset, i) for x, i in zip(of_batch, batch, strict=True)]
                blank = torch.zeros(stage1.input_shape(m))
                raw[m] = torch.stack([blank if x is None else x for x in inputs]).to(device)
        present = {m: torch.tensor([x is not None for x in of_batch], device=device) for m, of_batch in items.items()}
        with torch.no_grad():
            features = stage1.encode({**raw, "present": present}, precision)
        return as_stored(features) if self.settings.data.views else features

    def _input(self, source: Any, modality: str, dataset: str | None, item: int) -> Tensor | None:
        if source is None:
            return None
        try:
            if modality in self.further:
                return self.further[modality](source)
            return picture_tensor(source, modality, self.image_options, dataset=dataset or self._dataset_of(source))
        except BadImage as error:
            source = source.image if isinstance(source, Touch) else source
            name = source if isinstance(source, str | Path) else type(source).__name__
            raise UserError(
                f"item {item} of {modality} ({name}) cannot be used: {error}; leave it out or give None."
            ) from error

    def _dataset_of(self, source: Picture) -> str:
        """TVL's data set of a file in the data folder of the run; "ssvtp" for all other pictures."""
        if isinstance(source, str | Path):
            with suppress(ValueError):
                parts = Path(source).resolve().relative_to(self.settings.data.datasets_dir.resolve()).parts
                if parts[0] == "hct":
                    return "hct/data3" if parts[1:2] == ("data3",) else "hct"
        return "ssvtp"

    def embed_features(
        self, features: Features | Mapping[str, Any], *, keep: int | None = None, attention: bool = False
    ) -> Embeddings:
        """Embed frozen features: a batch of a store, or {modality: (B, T, W) or (B, W) array} as in
        `FeatureStore.from_arrays`, whose pooled features are the normalised mean of the tokens.
        """
        if not isinstance(features, Features):
            features = self._features(features)
        check_keep(keep, self.count)
        features = features.to(self.device)
        kept = None if keep is None else prefix(len(features), self.count, keep)
        with torch.no_grad():
            output = self.model(features, kept=kept, joint=False)
            pooled = pooled_overlapping(output)
        present = {m: t.present.cpu() for m, t in features.modalities.items()}

        def blanked(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {m: (z.float().cpu() * present[m].view(-1, *[1] * (z.ndim - 1))) for m, z in x.items()}

        maps = blanked(attention_maps(self.model, features, kept)) if attention else {}
        return Embeddings(
            blanked(output.overlapping_tokens), blanked(output.complementary_tokens), blanked(pooled), present, maps
        )

    def _features(self, arrays: Mapping[str, Any]) -> Features:
        tokens: dict[str, Tokens] = {}
        for m, array in arrays.items():
            x = torch.as_tensor(np.asarray(array) if not isinstance(array, Tensor) else array, dtype=torch.float32)
            x = x[:, None] if x.ndim == 2 else x
            spec = self.specs.get(m)
            if spec is None or x.ndim != 3 or x.shape[2] != spec.width or not 1 <= x.shape[1] <= spec.tokens:
                known = ", ".join(f"{name} (B, {s.tokens}, {s.width})" for name, s in self.specs.items())
                raise UserError(f"{m} has the shape {tuple(x.shape)}, but this run takes {known}; give such features.")
            if not x.isfinite().all():
                raise UserError(f"{m} has values that are not finite; leave these rows out.")
            rows = torch.ones(len(x), dtype=torch.bool)
            pooled = nn.functional.normalize(x.mean(1), dim=-1)
            tokens[m] = Tokens(x, rows[:, None].expand(x.shape[:2]), pooled, rows)
        count = self._rows(dict(arrays))
        return as_stored(Features(tokens, torch.arange(count)[:, None], torch.arange(count)))

    def embed_split(
        self, source: FeatureSource, *, keep: int | None = None, attention: bool = False, quiet: bool = True
    ) -> Embeddings:
        """Embed the plain views of all rows of a split of a feature store, such as `FeatureStore(folder).splits["test"]`."""
        rows = torch.arange(len(source)).split(4 * BATCH)
        parts: list[Embeddings] = []
        with progress(len(source), "embed", "row", quiet) as bar:
            for features in source.batches(rows, [torch.zeros_like(r) for r in rows], self.device):
                parts.append(self.embed_features(features, keep=keep, attention=attention))
                bar.update(len(features))
        return Embeddings.joined(parts)

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write the run as a folder to share, as `tvl-align export` does. options: those of ExportConfig (licence=)."""
        out = Path(folder)
        if not (self.folder / WEIGHTS).is_file():
            return export(ExportConfig(self.folder, out, **{"checkpoint": self.checkpoint, **options}))
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty; give a new folder.")
        out.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG, CARD):
            shutil.copyfile(self.folder / name, out / name)
        return out

    @classmethod
    def from_pretrained(cls, where: str | Path, **options: Any) -> "Registers":
        """`load`, under the name that libraries of the Hugging Face hub use."""
        return load(where, **options)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any) -> str:
        """Upload the exported run to a model repository of the Hugging Face hub, which is created if missing; returns its
        address. options: those of `save_pretrained`. The card, README.md, says what the weights are."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / repo_id.rpartition("/")[2], **options)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=saved)
        return str(address)

    def open_store(self) -> FeatureStore:
        """The feature store that the run was trained on. Raises UserError if it is gone."""
        return FeatureStore(self._store_folder)

    @property
    def _store_folder(self) -> Path:
        return self.settings.data.store or self.settings.feature_dir / str(self.config["store"])

    @staticmethod
    def similarity(one: Embeddings, other: Embeddings | None = None) -> dict[str, Tensor]:
        """Cosine similarities of the pooled vectors: {pair: (B, B')}, for the first modality of the pair in `one` and the
        second in `other` (default: `one`). Rows that lack a modality have similarity 0 to all.

        Pairs are named as in evaluation: vision and tactile are "tactile_vision".
        """
        other = other or one
        names = list(dict.fromkeys([*one.pooled, *other.pooled]))
        pairs = [(pair_name(a, b), a, b) for a, b in combinations(names, 2)]
        found = {}
        for name, a, b in pairs:
            first, second = (a, b) if name.startswith(f"{a}_") else (b, a)
            if first in one.pooled and second in other.pooled:
                found[name] = one.pooled[first] @ other.pooled[second].T
        return found


def as_stored(features: Features) -> Features:
    """Features at the precision of a feature store, whose tokens are half-precision numbers."""
    tokens = {
        m: Tokens((t.tokens * t.mask[..., None]).half().float(), t.mask, t.pooled, t.present)
        for m, t in features.modalities.items()
    }
    return replace(features, modalities=tokens)


def check_keep(keep: int | None, registers: int) -> None:
    """Raise UserError for a number of registers that a run does not have."""
    if keep is not None and not 1 <= keep <= registers:
        raise UserError(f"keep={keep} is out of range; give 1 to {registers}, the registers of this run.")


def _as_list(modality: str, items: Any, pictures: bool) -> list[Any]:
    """The items of a modality as a list; one item alone is a list of one. pictures: four axes are those of a batch."""
    if isinstance(items, str | Path | Image.Image | Touch):
        return [items]
    if isinstance(items, np.ndarray | Tensor):
        return list(items) if pictures and items.ndim == 4 else [items]
    if not isinstance(items, Sequence):
        raise UserError(f"{modality} is a {type(items).__name__}; give a list of paths, images, arrays or sentences.")
    return list(items)


def _sentence(text: Any, prompt: str | None, item: int) -> str:
    """The sentence of a text: adjectives after the prompt, or, without a prompt, the text as it is; "" for None."""
    if text is None:
        return ""
    if not isinstance(text, str) or is_absent(text) or (prompt is not None and not adjectives(text)):
        raise UserError(f"item {item} of text is {text!r:.60}; give adjectives such as 'soft, woven', a sentence, or None.")
    return text if prompt is None else evaluation_text(text, prompt)


def load(
    where: str | Path,
    *,
    checkpoint: str = "checkpoint.pth",
    stage1_checkpoint: str | Path | None = None,
    stage1: Stage1 | None = None,
    method: str | None = None,
    device: str | None = None,
) -> Registers:
    """Load a trained run for use: a run folder, a folder written by `tvl-align export`, or a model id of a hub, "user/name".

    checkpoint: of a run folder: checkpoint.pth, checkpoint-acc1.pth or checkpoint-acc5.pth. stage1_checkpoint: the TVL
    checkpoint of the encoders, where it is not where the run found it; stage1: the same, loaded. It is loaded on first use,
    and refused if its weights are not those of the run. method: of a run of your own method, as for `train`. device: cuda or
    cpu; default: cuda if available.

    Raises UserError for anything else, for damaged files and for runs of another major version of their method.
    """
    folder, places = Path(where), Places(stage1_checkpoint=Path(stage1_checkpoint) if stage1_checkpoint else None)
    if not folder.exists() and HUB_ID.fullmatch(str(where)):
        folder = _downloaded(str(where))
    on = pick_device(device)
    if (folder / WEIGHTS).is_file():
        settings, of_run, config, weights = read_export(folder, method, places)
        path = folder / WEIGHTS
    else:
        settings, of_run, config = load_run(folder, method, places)
        path = folder / checkpoint
        weights = load_checkpoint(path)["model"]
    specs = specs_of(settings, config)
    model = model_of(of_run, settings.knobs, specs, weights, path)
    return Registers(model, specs, of_run, settings, config, folder, on, checkpoint, stage1)


def _downloaded(name: str) -> Path:
    """The folder of an exported run on a hub, from its cache or downloaded: JSON, weights and the card only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"there is no folder {name}, and no model of that name could be downloaded ({reason}).") from error
