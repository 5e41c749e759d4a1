"""Detect modalities whose images carry no information: each of one colour, or all the same."""

from collections.abc import Mapping

from torch import Tensor

ONE_COLOUR = 0.005  # largest standard deviation of a colour channel in an image of one colour; 1 is the range of a pixel
THE_SAME = 0.002  # largest difference of two statistics of images that look the same
SHARE = 0.5  # of the images of a modality
NAMES = {"vision": "photos", "tactile": "touch images"}  # others are named "pictures of depth"


def constant_modalities(statistics: Mapping[str, Tensor]) -> list[str]:
    """A clause for each modality of which most images are of one colour each or look the same, such as "all 96 photos are of
    one colour each".

    statistics: {modality: (N, 6) float32}, the mean and the standard deviation of each colour channel of every image, in
    0 to 1; NaN where a row has no image.
    """
    found = []
    for modality, rows in statistics.items():
        images = rows[~rows.isnan().any(1)]
        if len(images) < 2:
            continue
        plain = int((images[:, 3:] < ONE_COLOUR).all(1).sum())
        same = int(((images - images.median(0).values).abs() < THE_SAME).all(1).sum())
        count, what = max((plain, "are of one colour each"), (same, "look the same"))
        if count > SHARE * len(images):
            share = "all" if count == len(images) else f"{count} of"
            found.append(f"{share} {len(images)} {NAMES.get(modality, f'pictures of {modality}')} {what}")
    return found
