"""Whether two feature stores hold the same rows, for stores that were written in different ways."""

import torch

from tvl_align.features.store import FeatureStore


def assert_same(found: FeatureStore, expected: FeatureStore) -> None:
    """The same labels, names, captions and features of complete rows; keys of captions may be other numbers."""
    assert (found.folder / "labels.csv").read_text() == (expected.folder / "labels.csv").read_text()
    assert found.manifest["splits"] == expected.manifest["splits"]
    for name, split in expected.splits.items():
        rows = torch.arange(len(split))
        assert list(found.splits[name].names) == list(split.names)
        a, b = found.splits[name].read(rows), split.read(rows)
        assert torch.equal(a.caption_keys[:, None] == a.caption_keys, b.caption_keys[:, None] == b.caption_keys)
        for m, t in b.modalities.items():
            assert t.present.all() and torch.equal(a.modalities[m].mask, t.mask)
            assert (a.modalities[m].pooled - t.pooled).abs().max() < 1e-6
            assert torch.allclose(a.modalities[m].tokens.float(), t.tokens.float(), rtol=2e-3, atol=1e-5)
