from collections import Counter

import pytest

from timm_memwrap.data.opening import open_digits


def test_splits_share_no_sample_and_leave_none_out() -> None:
    train, test = open_digits("train"), open_digits("test")
    names = [data.filename(i) for data in (train, test) for i in range(len(data))]
    assert len(names) == len(set(names)) == 1797


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_class_has_its_share(split: str) -> None:
    data = open_digits(split)
    counts = Counter(data.targets)
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 8


def test_images_are_the_files_and_labels_agree() -> None:
    from sklearn.datasets import load_digits

    bunch, data = load_digits(), open_digits("test")
    for i in (0, 7, len(data) - 1):
        image, label = data[i]
        position = int(data.filename(i))
        assert label == data.targets[i] == bunch.target[position]
        assert [round(value * 16 / 255) for value in image.tobytes()] == bunch.images[position].flatten().tolist()


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'validation'.*'train', 'test'"):
        open_digits("validation")
