"""Encoders of one's own: what they give, that no weight is random, that TVL's stay as they were, one sentence otherwise."""

import json
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from own_encoders import Letters
from safetensors.torch import save_file
from torch import Tensor, nn

from tvl_align.encoders.own import LOADERS, load_encoder, load_encoders
from tvl_align.encoders.small import SMALL_CLIP
from tvl_align.encoders.tvl import FILE_ENCODERS, Stage1, Stage1Config, load_stage1
from tvl_align.system.console import UserError

VIT = "vit_tiny_patch16_224"


class Means(nn.Module):
    """The smallest encoder of images: the mean colour of each quarter."""

    size, mean, std = 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = F.adaptive_avg_pool2d(images * self.scale, 2).flatten(2).transpose(1, 2)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), F.normalize(tokens.flatten(1), dim=-1)


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `encoders_of_mine`, which anyone may have installed."""
    found: Any = types.ModuleType("encoders_of_mine")
    found.__spec__ = types.SimpleNamespace(origin="/mine/encoders_of_mine.py", submodule_search_locations=None)
    found.Means, found.Letters = Means, Letters
    monkeypatch.setitem(sys.modules, "encoders_of_mine", found)
    return found


@pytest.fixture
def vit_file(tmp_path: Path) -> Path:
    """Weights of a ViT for images of 32 pixels, in which no two weights are equal."""
    model = timm.create_model(VIT, img_size=32, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


OWN = {
    "vision_encoder": "encoders_of_mine:Means",
    "tactile_encoder": "encoders_of_mine:Means",
    "text_encoder": "encoders_of_mine:Letters",
}


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_projection = nn.Parameter(torch.zeros(3, 4))
        self.visual = nn.Conv2d(3, 2, 2)


class Touch(nn.Module):
    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(5, 4)


@pytest.mark.parametrize(
    ("latent", "features", "modalities", "expected"),
    [
        (None, "tokens", ("vision", "tactile", "text"), "6159de79cad447bde60e1dea0ddd54e1a47b399cf90b60f4d390b5ea7e94b563"),
        (2, "pooled", ("vision", "text"), "b52788ffcdfa72a1f15d180da22d76d9a6da16fa3f274dd9d66bdb94b8e6fdf4"),
    ],
)
def test_the_fingerprint_of_tvls_encoders_never_changes(
    latent: int | None, features: Any, modalities: tuple[str, ...], expected: str
) -> None:
    """Every feature store and run names it. These were computed before there were encoders of one's own."""
    stage1 = Stage1(Clip(), None, Touch(), latent, features, modalities)
    with torch.no_grad():
        for i, (_, value) in enumerate(sorted(stage1.state_dict().items())):
            value.copy_((torch.arange(value.numel()) % 7 + i).view(value.shape))
    assert stage1.freeze().fingerprint() == expected


def test_options_without_own_encoders_give_tvls(stage1_checkpoint: Path) -> None:
    given, expected = load_encoders(Stage1Config(stage1_checkpoint)), load_stage1(stage1_checkpoint)
    assert given.fingerprint() == expected.fingerprint()
    assert given.state_dict().keys() == expected.state_dict().keys()
    assert given.picture_norm("vision") is None and given.picture_norm("tactile") is None


def test_own_encoders_of_all_modalities_need_no_checkpoint() -> None:
    stage1 = load_encoders(Stage1Config(**OWN))
    assert stage1.clip is None and stage1.tactile_encoder is None
    assert {m: (s.tokens, s.width, s.pooled_width) for m, s in stage1.specs.items()} == {
        "vision": (4, 3, 12),
        "tactile": (4, 3, 12),
        "text": (10, 6, 6),
    }
    assert stage1.photo_size == stage1.touch_size == 8
    assert stage1.picture_norm("tactile") == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)) and stage1.picture_norm("text") is None
    images = torch.rand(2, 3, 8, 8)
    read = stage1.train().encode({"vision": images, "text": ["soft", "hard and so"]})
    assert torch.allclose(read.modalities["vision"].tokens[1, 0], images[1, :, :4, :4].mean((1, 2)))
    assert read.modalities["text"].mask.sum(1).tolist() == [4, 10]
    assert len(set(read.caption_keys[:, 0].tolist())) == 2
    assert not any(p.requires_grad for p in stage1.parameters()) and not any(m.training for m in stage1.modules())
    with pytest.raises(UserError, match=r"the shape \(2, 3, 9, 9\), but the encoder takes \(B, 3, 8, 8\)"):
        stage1.encode({"vision": torch.rand(2, 3, 9, 9)})
    assert load_encoders(Stage1Config(features="pooled", **OWN)).specs["vision"].tokens == 1


def test_one_own_encoder_leaves_the_others_to_tvl(stage1_checkpoint: Path) -> None:
    tvl = load_stage1(stage1_checkpoint)
    mixed = load_encoders(Stage1Config(stage1_checkpoint, vision_encoder=OWN["vision_encoder"]))
    touch = torch.rand(2, 3, 64, 64)
    read = mixed.encode({"vision": torch.rand(2, 3, 8, 8), "tactile": touch, "text": ["soft", "hard"]}).modalities
    expected = tvl.encode({"tactile": touch, "text": ["soft", "hard"]}).modalities
    assert all(torch.equal(read[m].tokens, expected[m].tokens) for m in expected)
    assert (mixed.photo_size, mixed.touch_size, read["vision"].pooled.shape) == (8, 64, (2, 12))
    assert mixed.fingerprint() != tvl.fingerprint()
    only_touch = replace(Stage1Config(), tactile_encoder=OWN["tactile_encoder"])
    assert load_encoders(only_touch, ["tactile"]).specs.keys() == {"tactile"}
    with pytest.raises(
        UserError, match=r"of vision, text; give --stage1_checkpoint FILE, or --vision_encoder, --text_encoder"
    ):
        load_encoders(only_touch)
    with pytest.raises(UserError, match="there is no encoder of text; give one in `own`"):
        Stage1(None, None, None, modalities=("vision", "text"), own={"vision": Means()})


def test_the_fingerprint_depends_on_all_that_changes_a_feature(module: Any) -> None:
    def fingerprint(**changes: Any) -> str:
        module.Changed = lambda: Means(**changes) if "scale" in changes else type("Means", (Means,), changes)()
        return load_encoders(Stage1Config(**OWN | {"vision_encoder": "encoders_of_mine:Changed"})).fingerprint()

    changes: list[dict[str, Any]] = [{"scale": 2.0}, {"mean": (0.5, 0.5, 0.4)}, {"std": (1.0, 1.0, 1.0)}, {"size": 16}]
    prints = [fingerprint(), *(fingerprint(**change) for change in [*changes, {"name": "another"}])]
    assert len(set(prints)) == len(prints)
    assert fingerprint() == prints[0]
    before = load_encoders(Stage1Config(**OWN)).fingerprint()
    module.Letters = type(
        "Letters", (Letters,), {"tokenize": lambda self, s: Letters.tokenize(self, [x.lower() for x in s])}
    )
    assert load_encoders(Stage1Config(**OWN)).fingerprint() != before


def test_a_timm_model_is_read_from_a_file(vit_file: Path) -> None:
    """Its image size is that of the weights, its pooled features are timm's, and its classifier has no part in it."""
    encoder = load_encoder(f"timm:{VIT}:{vit_file}", "tactile")
    model = timm.create_model(VIT, img_size=32, num_classes=7)
    model.load_state_dict(torch.load(vit_file, weights_only=True))
    images = torch.rand(2, 3, 32, 32)
    tokens, mask, pooled = encoder.encode(images)
    assert (encoder.size, encoder.mean, encoder.std) == (32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert tokens.shape == (2, 5, 192) and bool(mask.all())
    features = model.eval().forward_features(images)
    assert torch.allclose(tokens, features, atol=1e-5)  # a grid of 2 x 2 is not pooled
    assert torch.allclose(pooled, F.normalize(features[:, 0], dim=-1), atol=1e-6)
    save_file({f"module.{k}": v for k, v in model.state_dict().items()}, vit_file.with_suffix(".safetensors"))
    again = load_encoder(f"timm:{VIT}:{vit_file.with_suffix('.safetensors')}", "vision")
    assert torch.equal(again.encode(images)[0], tokens)
    assert load_encoders(Stage1Config(**OWN | {"tactile_encoder": f"timm:{VIT}:{vit_file}"})).specs["tactile"].width == 192


@pytest.mark.parametrize(("name", "width", "size"), [("resnet10t", 512, 176), ("mobilenetv3_small_050", 288, 224)])
def test_a_cnn_is_read_like_a_vit(name: str, width: int, size: int, tmp_path: Path) -> None:
    """Where the pooled features have another width than the grid, the mean of the grid is the first token."""
    model = timm.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "cnn.pth")
    encoder, images = load_encoder(f"timm:{name}:{tmp_path / 'cnn.pth'}", "vision"), torch.rand(1, 3, size, size)
    tokens, _, pooled = encoder.encode(images)
    assert encoder.size == size and tokens.shape == (1, 17, width)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(pooled, F.normalize(expected, dim=-1), atol=1e-6)
    grid = model.forward_intermediates(images, indices=1)[1][-1]
    assert torch.allclose(tokens[:, 0], expected if expected.shape[1] == width else grid.mean((2, 3)), atol=1e-5)


def test_a_vit_that_pools_the_mean_is_known_by_its_weights(tmp_path: Path) -> None:
    """As TVL's touch encoders are. The norm after pooling is applied to the grid, too."""
    model = timm.create_model(VIT, img_size=32, global_pool="avg", num_classes=0).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "mean.pth")
    encoder, images = load_encoder(f"timm:{VIT}:{tmp_path / 'mean.pth'}", "vision"), torch.rand(2, 3, 32, 32)
    tokens, _, pooled = encoder.encode(images)
    assert torch.allclose(pooled, F.normalize(model(images), dim=-1), atol=1e-6)
    assert torch.allclose(tokens[:, 1:], model.fc_norm(model.forward_features(images))[:, 1:], atol=1e-5)


def test_weights_that_do_not_fit_are_named(vit_file: Path, tmp_path: Path) -> None:
    state = torch.load(vit_file, weights_only=True)
    gone = {k: v for k, v in state.items() if k != "blocks.3.norm1.bias"} | {"extra.weight": torch.ones(2)}
    torch.save(gone, tmp_path / "gone.pth")
    with pytest.raises(
        UserError, match=r"missing keys: blocks\.3\.norm1\.bias; unexpected keys: extra\.weight; give --vision"
    ):
        load_encoder(f"timm:{VIT}:{tmp_path / 'gone.pth'}", "vision")
    with pytest.raises(UserError, match=r"wrong shapes: .*attn\.proj\.bias \(192,\), needs \(384,\)"):
        load_encoder(f"timm:vit_small_patch16_224:{vit_file}", "vision")
    torch.save(state | {"norm.bias": torch.full((192,), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth has NaN or inf in 'norm\.bias'"):
        load_encoder(f"timm:{VIT}:{tmp_path / 'nan.pth'}", "vision")
    torch.save({"model": 3}, tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"none\.pth has no weights, alone or as an entry"):
        load_encoder(f"timm:{VIT}:{tmp_path / 'none.pth'}", "vision")
    with pytest.raises(UserError, match=r"there is no file /nowhere/w\.pth; give the path of a file of weights"):
        load_encoder(f"timm:{VIT}:/nowhere/w.pth", "vision")


def test_open_clip_towers_are_those_of_tvl(stage1_checkpoint: Path) -> None:
    """The same weights as an encoder of one's own give the same features; each tower holds its own weights only."""
    name = f"open_clip:{SMALL_CLIP}:{stage1_checkpoint.parent / 'clip.pt'}"
    tvl = load_stage1(stage1_checkpoint, modalities=("vision", "text"))
    mine = load_encoders(Stage1Config(vision_encoder=name, text_encoder=name), ("vision", "text"))
    batch = {"vision": torch.rand(2, 3, 64, 64), "text": ["soft.", "soft, patterned, lined, and fabric."]}
    read, expected = mine.encode(batch), tvl.encode(batch)
    for m in batch:
        assert torch.allclose(read.modalities[m].tokens, expected.modalities[m].tokens, atol=1e-5)
        assert torch.allclose(read.modalities[m].pooled, expected.modalities[m].pooled, atol=1e-6)
        assert torch.equal(read.modalities[m].mask, expected.modalities[m].mask)
    assert mine.specs == tvl.specs and torch.equal(read.caption_keys, expected.caption_keys)
    assert mine.picture_norm("vision") == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    names = mine.own.state_dict()
    assert any(k.startswith("vision.") for k in names) and not any("text.clip.visual" in k for k in names)


def test_a_text_tower_without_an_end_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As SigLIP's: it pools its last place, and its tokenizer pads with another id than 0."""
    config = {
        "embed_dim": 8,
        "custom_text": True,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 6, "vocab_size": 9, "width": 64, "heads": 1, "layers": 1}
        | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    }
    (tmp_path / "Tiny-SigLIP.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    clip = open_clip.create_model("Tiny-SigLIP", load_weights=False).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")

    class Tokenizer:
        tokenizer = types.SimpleNamespace(pad_token_id=1)

        def __call__(self, sentences: Sequence[str]) -> Tensor:
            return torch.tensor([([3 + len(w) for w in s.split()] + [1] * 6)[:6] for s in sentences])

    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: Tokenizer())
    encoder = load_encoder(f"open_clip:Tiny-SigLIP:{tmp_path / 'clip.pt'}", "text")
    ids = encoder.tokenize(["a bc", "abc", ""])
    tokens, mask, pooled = encoder.encode(ids)
    assert tokens.shape == (3, 2, 64) and mask.sum(1).tolist() == [2, 1, 1]
    assert torch.allclose(pooled, clip.encode_text(ids, normalize=True), atol=1e-6)


def test_an_anytouch_checkpoint_is_a_vit_with_tokens_of_the_sensor(tmp_path: Path) -> None:
    """Written in its names, with weights of a timm ViT; the image stands for each of three frames."""
    width, depth, sensors = 64, 2, torch.randn(10, 5, 64)
    frames, projection = torch.randn(width, 3, 3, 7, 7) / 10, torch.randn(12, width)
    vit = timm.models.VisionTransformer(
        28, 7, embed_dim=width, depth=depth, num_heads=1, pre_norm=True, num_classes=0, norm_layer=nn.LayerNorm
    ).eval()
    touch = {
        "embeddings.class_embedding": vit.cls_token.data.flatten(),
        "embeddings.position_embedding.weight": vit.pos_embed.data[0],
        "embeddings.patch_embedding.weight": torch.zeros(width, 3, 7, 7),  # unused
    }
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        touch |= {f"{theirs}.{k}": v for k, v in getattr(vit, ours).state_dict().items()}
    for i, block in enumerate(vit.blocks):
        pairs = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for ours, theirs in (pairs | {"attn.proj": "self_attn.out_proj"}).items():
            part = block.get_submodule(ours).state_dict()
            touch |= {f"encoder.layers.{i}.{theirs}.{k}": v for k, v in part.items()}
        for k, v in block.attn.qkv.state_dict().items():
            touch |= {f"encoder.layers.{i}.self_attn.{x}_proj.{k}": y for x, y in zip("qkv", v.chunk(3), strict=True)}
    content = {f"touch_mae_model.touch_model.{k}": v.clone() for k, v in touch.items()} | {
        "touch_mae_model.video_patch_embedding.weight": frames,
        "touch_mae_model.touch_projection.weight": projection,
        "touch_mae_model.sensor_token": sensors,
        "vision_model.embeddings.class_embedding": torch.zeros(3),
    }
    torch.save({"model": content}, tmp_path / "anytouch.pth")
    encoder, images = load_encoder(f"anytouch:{tmp_path / 'anytouch.pth'}", "tactile"), torch.rand(2, 3, 28, 28)
    x = F.conv3d(images[:, :, None].repeat(1, 1, 3, 1, 1), frames, stride=(3, 7, 7)).flatten(2).transpose(1, 2)
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1)
    x = torch.cat([first, sensors[-1].expand(2, -1, -1), x + vit.pos_embed[:, 1:]], dim=1)
    with torch.no_grad():
        x = vit.norm(vit.blocks(vit.norm_pre(x)))
    tokens, _, pooled = encoder.encode(images)
    assert (encoder.size, encoder.mean) == (28, (0.485, 0.456, 0.406))
    assert torch.allclose(tokens, torch.cat([x[:, :1], x[:, 6:]], dim=1), atol=1e-5)
    assert torch.allclose(pooled, F.normalize(x[:, 0] @ projection.T, dim=-1), atol=1e-5)
    name = "touch_mae_model.touch_model.encoder.layers.1.self_attn.v_proj.bias"
    for changed, error in (
        (
            {k: v for k, v in content.items() if k != name},
            r"wrong shapes: blocks\.1\.attn\.qkv\.bias \(128,\), needs \(192,\)",
        ),
        (
            content | {name.replace("self", "temporal"): torch.zeros(64)},
            r"unexpected keys: blocks\.1\.temporal_attn\.v_proj",
        ),
        ({"touch_model.x": torch.zeros(1)}, "is no checkpoint of AnyTouch, it lacks touch_model.embeddings.class_emb"),
    ):
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(UserError, match=error):
            load_encoder(f"anytouch:{tmp_path / 'changed.pth'}", "tactile")


def sentence_model(folder: Path) -> Any:
    """A tiny BERT with random weights and its tokenizer, as transformers writes them."""
    transformers = pytest.importorskip("transformers", reason="the extra `encoders` is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "soft", "hard", "."]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    return model


def test_a_text_model_of_transformers(tmp_path: Path) -> None:
    model = sentence_model(tmp_path / "bert")
    encoder = load_encoder(f"hf:{tmp_path / 'bert'}", "text")
    ids = encoder.tokenize(["soft.", "hard"])
    tokens, mask, pooled = encoder.encode(ids)
    assert ids.shape == (2, 16) and mask.sum(1).tolist() == [4, 3]
    with torch.no_grad():
        expected = model(input_ids=ids[1:, :3]).last_hidden_state
    assert torch.allclose(tokens[1, :3], expected[0], atol=1e-5)
    assert torch.allclose(pooled[1], F.normalize(expected[0].mean(0), dim=-1), atol=1e-5)
    with pytest.raises(UserError, match="its image processor cannot be loaded"):
        load_encoder(f"hf:{tmp_path / 'bert'}", "vision")
    state = {k: v for k, v in model.state_dict().items() if k != "encoder.layer.1.output.dense.bias"}
    save_file(state, tmp_path / "bert/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of this model.*: encoder\.layer\.1\.output\.dense\.bias"):
        load_encoder(f"hf:{tmp_path / 'bert'}", "text")


def test_a_vision_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `encoders` is not installed")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    norm = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    crop = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 32}}
    transformers.BitImageProcessor(**crop, **norm).save_pretrained(tmp_path)
    encoder, images = load_encoder(f"hf:{tmp_path}", "tactile"), torch.rand(2, 3, 28, 28)
    tokens, _, pooled = encoder.encode(images)
    assert (encoder.size, encoder.mean, encoder.std) == (28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert torch.allclose(tokens, model(images).last_hidden_state, atol=1e-5)
    assert torch.allclose(pooled, F.normalize(tokens[:, 0], dim=-1), atol=1e-6)


def test_a_model_of_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="the extra `encoders` is not installed")
    sentence_model(tmp_path / "bert")
    encoder = load_encoder(f"st:{tmp_path / 'bert'}", "text")
    tokens, mask, pooled = encoder.encode(encoder.tokenize(["soft.", "hard"]))
    expected = encoder.model.encode(["soft.", "hard"], normalize_embeddings=True, convert_to_tensor=True)
    assert tokens.shape == (2, 4, 24) and mask.sum(1).tolist() == [4, 3]
    assert torch.allclose(pooled, expected, atol=1e-5)


@pytest.mark.parametrize("prefix", ["hf", "st"])
def test_a_missing_package_names_its_extra(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"needs \w*transformers; run pip install 'tvl-align\[encoders\]'"):
        load_encoder(f"{prefix}:some/model", "text")


@pytest.mark.parametrize(
    ("name", "modality", "error"),
    [
        ("timm:resnet18", "text", "timm encodes vision and tactile only; give an encoder of text"),
        ("st:some/model", "vision", "st encodes text only; give an encoder of vision"),
        ("anytouch:file.pth", "vision", "anytouch encodes tactile only"),
        ("timm:resnet_of_nobody", "vision", r"cannot be loaded \(Unknown model"),
        (f"timm:{VIT}", "vision", r"--vision_encoder timm:vit_tiny_patch16_224 cannot be loaded \(.*give a name of timm"),
        ("open_clip:ViT-B-32", "text", "names no weights; give open_clip:NAME:TAG or open_clip:NAME:FILE"),
        ("open_clip:ViT-Z:openai", "text", "unknown OpenCLIP model 'ViT-Z'; give --text_encoder"),
        ("open_clip:ViT-B-32:nonsense", "vision", "no CLIP weights 'nonsense' for ViT-B-32 .*; --vision_encoder open_clip"),
        ("resnet18", "vision", "--vision_encoder resnet18 names no encoder; give timm:..., anytouch:..., sparsh:"),
        ("nowhere:Means", "vision", "cannot be imported: there is no module 'nowhere'; install it, or give one of timm:"),
        ("encoders_of_mine:Nothing", "vision", "encoders_of_mine:Nothing is not defined; it must name a class or function"),
        ("encoders_of_mine:Letters", "vision", "has no size and no mean and no std; see tvl_align.encoders.own"),
        ("encoders_of_mine:Means", "text", "has no tokenize; see tvl_align.encoders.own"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_sentence(name: str, modality: str, error: str) -> None:
    with pytest.raises(UserError, match=error) as raised:
        load_encoder(name, modality)
    assert "\n" not in str(raised.value)


GOOD = (torch.ones(1, 4, 3), torch.ones(1, 4, dtype=torch.bool), F.normalize(torch.ones(1, 5)))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (None, "encode must give the three tensors tokens, mask and pooled"),
        (GOOD[:2], "encode must give the three tensors"),
        ((GOOD[0][0], *GOOD[1:]), r"tokens must be floats \(B, T, W\), and is torch.float32 \(4, 3\) for B = 1"),
        ((GOOD[0].long(), *GOOD[1:]), r"tokens must be floats \(B, T, W\), and is torch.int64 \(1, 4, 3\)"),
        ((GOOD[0], GOOD[1].float(), GOOD[2]), r"mask must be bool \(B, T\), and is torch.float32 \(1, 4\)"),
        ((GOOD[0], GOOD[1][:, :3], GOOD[2]), r"mask must be bool \(B, T\), and is torch.bool \(1, 3\)"),
        ((*GOOD[:2], GOOD[2][0]), r"pooled must be floats \(B, E\), and is torch.float32 \(5,\)"),
        ((*GOOD[:2], GOOD[2] * torch.nan), "gives numbers that are not finite"),
        ((*GOOD[:2], GOOD[2] * 3), "pooled must have the norm 1, not 3; apply torch.nn.functional.normalize"),
    ],
)
def test_an_encoder_that_gives_something_else_is_refused(given: Any, error: str, module: Any) -> None:
    module.Other = type("Other", (Means,), {"encode": lambda self, images: given})
    with pytest.raises(UserError, match=f"--vision_encoder encoders_of_mine:Other.*{error}"):
        load_encoder("encoders_of_mine:Other", "vision")
    module.Other = type("Other", (Means,), {"encode": lambda self, images: GOOD})
    assert isinstance(load_encoder("encoders_of_mine:Other", "vision"), Means)


def test_an_encoder_that_fails_says_where(module: Any) -> None:
    module.Other = lambda: 1 / 0
    with pytest.raises(UserError, match=r"cannot be made: ZeroDivisionError: division by zero \(.*test_own\.py, line \d+\)"):
        load_encoder("encoders_of_mine:Other", "vision")
    module.Other = lambda: "an encoder"
    with pytest.raises(UserError, match="gives a str; it must give a torch.nn.Module"):
        load_encoder("encoders_of_mine:Other", "vision")
    module.Other = type("Other", (Means,), {"encode": lambda self, images: 1 / 0})
    with pytest.raises(UserError, match="cannot encode an input: division by zero"):
        load_encoder("encoders_of_mine:Other", "vision")
    module.Other = type("Other", (Means,), {"std": (1.0, 0.0, 1.0)})
    with pytest.raises(UserError, match="mean and std must be three numbers each, std above 0"):
        load_encoder("encoders_of_mine:Other", "vision")


def test_no_encoder_is_imported_from_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encoder_of_a_stranger.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    config = Stage1Config(vision_encoder="encoder_of_a_stranger:Bomb")
    with pytest.raises(UserError, match="nothing in a run folder is imported; move the module out of it"):
        load_encoders(config, ["vision"], never_from=tmp_path)


def test_the_path_of_weights_is_kept_absolute(vit_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run can be loaded from any folder, as for options that are paths."""
    monkeypatch.chdir(vit_file.parent)
    config = Stage1Config(vision_encoder=f"timm:{VIT}:vit.pth", text_encoder="hf:some/model", tactile_encoder="mine:vit.pth")
    assert config.vision_encoder == f"timm:{VIT}:{vit_file.resolve()}"
    assert (config.text_encoder, config.tactile_encoder) == ("hf:some/model", "mine:vit.pth")
    folder = Stage1Config(text_encoder=f"st:../{vit_file.parent.name}").text_encoder
    assert folder == f"st:{vit_file.parent.resolve()}"


def test_every_prefix_may_end_with_a_path() -> None:
    assert LOADERS.keys() == set(FILE_ENCODERS)
