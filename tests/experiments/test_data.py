"""The data sets of the experiments, and augmentation against a NumPy oracle."""

import io
import shutil

import huggingface_hub
import jax
import numpy as np
import pyarrow as pa
import pytest
import sklearn.datasets
from PIL import Image
from pyarrow import parquet

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data import datasets as data

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pixels(n, seed=0, side=32):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def encode(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def table(encoded, labels):
    rows = [{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(encoded)]
    return pa.table({"img": pa.array(rows, STRUCT), "label": pa.array(labels, pa.int64())})


def valid(n=2, seed=0):
    return table([encode(image) for image in pixels(n, seed)], [i % 10 for i in range(n)])


@pytest.fixture
def folder(tmp_path):
    """Two train shards and a test file, nested as on the hub."""
    (tmp_path / "plain_text").mkdir()
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002")):
        parquet.write_table(valid(3, seed=i), tmp_path / "plain_text" / f"{name}.parquet")
    parquet.write_table(valid(2, seed=2), tmp_path / "plain_text" / "test-00000-of-00001.parquet")
    return tmp_path


def broken(folder):
    """The file that the tests of errors overwrite."""
    return folder / "plain_text" / "train-00001-of-00002.parquet"


# Digits.


def test_digits_have_the_documented_shapes_and_types():
    digits = data.digits()
    assert digits.train.images.shape == (1198, 8, 8, 1)
    assert digits.test.images.shape == (599, 8, 8, 1)
    for split in (digits.train, digits.test):
        assert split.labels.shape == split.images.shape[:1]
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32


def test_normalized_digits_have_zero_mean_and_unit_variance():
    digits = data.digits()
    normalized = digits.normalize(digits.train.images)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose([normalized.mean(), normalized.std()], [0, 1], atol=1e-3)


def test_digits_are_split_without_overlap():
    rows = [np.c_[s.images.reshape(-1, 64), s.labels] for s in data.digits()[:2]]
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    everything = np.c_[images, labels].astype(int)
    assert sorted(map(tuple, np.concatenate(rows))) == sorted(map(tuple, everything))
    assert not set(map(tuple, rows[0])) & set(map(tuple, rows[1]))


def test_digits_are_split_by_class():
    train, test = (np.bincount(split.labels) for split in data.digits()[:2])
    assert len(test) == 10
    np.testing.assert_allclose(test, (train + test) / 3, atol=1)


def test_digits_are_not_augmented():
    digits = data.digits()
    images = digits.train.images[:8]
    np.testing.assert_array_equal(digits.augment(jax.random.key(0), images), images)


# CIFAR-10.


def test_cifar10_reads_shards_in_order_from_a_nested_folder(folder):
    cifar10 = data.cifar10(folder)
    np.testing.assert_array_equal(cifar10.train.images[:3], pixels(3, seed=0))
    np.testing.assert_array_equal(cifar10.train.images[3:], pixels(3, seed=1))
    np.testing.assert_array_equal(cifar10.train.labels, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(cifar10.test.images, pixels(2, seed=2))
    assert cifar10.train.images.dtype == np.uint8
    assert cifar10.train.labels.dtype == np.int32


def test_a_part_has_every_nth_example_to_train_on_and_all_to_test_on(folder):
    for load in (data.digits, lambda *part: data.cifar10(folder, *part)):
        whole = load()
        for i in range(4):
            part = load((i, 4))
            for got, expected in zip(part.train, whole.train, strict=True):
                np.testing.assert_array_equal(got, expected[i::4])
            np.testing.assert_array_equal(part.test.images, whole.test.images)


def test_cifar10_decodes_only_its_part(folder, monkeypatch):
    decoded, decode = [], data._decode
    monkeypatch.setattr(data, "_decode", lambda *args: decoded.append(1) or decode(*args))
    data.cifar10(folder, (1, 3))
    assert len(decoded) == 2 + 2


def test_cifar10_reads_jpeg(folder):
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    image = np.stack([np.tile(ramp, (32, 1)), np.tile(ramp[:, None], 32), np.full((32, 32), 99)], 2)
    jpeg = encode(image.astype(np.uint8), format="JPEG", quality=100, subsampling=0)
    parquet.write_table(table([jpeg], [7]), broken(folder))
    read = np.asarray(data.cifar10(folder).train.images[-1], int)
    np.testing.assert_allclose(read, image, atol=4)  # JPEG is lossy


def test_cifar10_is_normalized_per_channel(folder):
    images = pixels(2)
    mean, std = np.array(data.CIFAR10_MEAN), np.array(data.CIFAR10_STD)
    normalized = data.cifar10(folder).normalize(images)
    np.testing.assert_allclose(normalized, (images / 255 - mean) / std, rtol=1e-4, atol=1e-5)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data-dir: there is no folder .*absent"):
        data.cifar10(tmp_path / "absent")


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_missing_split_is_named(folder, name):
    for file in folder.rglob(f"{name}-*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no {name}-\*.parquet"):
        data.cifar10(folder)


@pytest.mark.parametrize("content", [lambda good: good[: len(good) // 2], lambda good: b"no"])
def test_a_corrupt_file_is_named(folder, content):
    file = broken(folder)
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file.name} is not a readable Parquet file"):
        data.cifar10(folder)


@pytest.mark.parametrize("names", [["image", "label"], ["img", "fine_label"]])
def test_other_columns_are_listed(folder, names):
    file = broken(folder)
    parquet.write_table(valid().rename_columns(names), file)
    with pytest.raises(ValueError, match=rf"{file.name} has the columns .*{names[0]}.*{names[1]}"):
        data.cifar10(folder)


GOOD = encode(pixels(1)[0])
# A wrong length of the pixels' chunk, for which Pillow raises a SyntaxError.
CHUNK = GOOD.index(b"IDAT")
BROKEN_PNG = GOOD[: CHUNK - 4] + (3).to_bytes(4, "big") + GOOD[CHUNK:]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pa.array([{"path": "a.png"}]), "'img' must be a struct with 'bytes'"),
        (pa.array([{"bytes": None, "path": "a.png"}], STRUCT), "'img' must be a struct"),
        (pa.array([None], STRUCT), "'img' must be a struct"),
        (pa.array([GOOD]), "'img' must be a struct"),
        (pa.array([{"bytes": b"no image"}], STRUCT), "the image cannot be decoded"),
        (pa.array([{"bytes": BROKEN_PNG}], STRUCT), "the image cannot be decoded: broken PNG"),
        (pa.array([{"bytes": GOOD[: len(GOOD) // 2]}], STRUCT), "the image cannot be decoded"),
        (pa.array([{"bytes": encode(pixels(1, side=28)[0])}], STRUCT), r"\(28, 28, 3\), not 32x32"),
    ],
    ids=[
        "no bytes",
        "null bytes",
        "null",
        "no struct",
        "garbage",
        "broken",
        "truncated",
        "wrong size",
    ],
)
def test_a_bad_image_is_named_by_file_and_row(folder, images, message):
    file = broken(folder)
    parquet.write_table(pa.table({"img": images, "label": [0]}), file)
    with pytest.raises(ValueError, match=f"{file.name}, row 0: .*{message}"):
        data.cifar10(folder)


@pytest.mark.parametrize("label", [-1, 10, None])
def test_a_bad_label_is_refused(folder, label):
    parquet.write_table(table([GOOD, GOOD], [3, label]), broken(folder))
    message = f"{broken(folder).name}, row 1: labels must be integers from 0 to 9"
    with pytest.raises(ValueError, match=message):
        data.cifar10(folder)


def test_without_a_folder_the_hub_is_asked(folder, monkeypatch):
    asked = []

    def download(repo_id, *, repo_type=None, **_):
        asked.append((repo_id, repo_type))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    np.testing.assert_array_equal(data.cifar10(None).test.images, pixels(2, seed=2))
    assert asked == [("uoft-cs/cifar10", "dataset")]


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("client closed")])
def test_without_a_network_the_error_names_data_dir(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConnectionError, match=f"{error}.*--data-dir") as raised:
        data.cifar10(None)
    assert raised.value.__cause__ is error


# Augmentation.


def augmenting():
    nothing = data.Split(None, None)
    return data.Data(nothing, nothing, 255.0, data.CIFAR10_MEAN, data.CIFAR10_STD, augmented=True)


def transforms(images, augmented):
    """Find which (row, column, flip) made each image, by trying all 9 x 9 x 2."""
    found = []
    for image, result in zip(images, np.asarray(augmented), strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32, 3))[:, :, 0]
        both = np.stack([windows, windows[..., ::-1, :]], axis=2)
        matches = np.argwhere((both == result).all((-3, -2, -1)))
        assert len(matches) == 1
        found.append(tuple(matches[0]))
    return np.array(found)


@pytest.mark.parametrize("seed", range(3))
def test_each_augmented_image_is_a_crop_or_flipped_crop_of_the_reflected_original(seed):
    images = pixels(16, seed)
    augmented = augmenting().augment(jax.random.key(seed), images)
    assert augmented.dtype == np.uint8
    assert len(np.unique(transforms(images, augmented), axis=0)) > 8  # not all alike


def test_all_offsets_and_both_flips_occur_and_are_independent():
    images = pixels(256)
    found = transforms(images, augmenting().augment(jax.random.key(0), images))
    rows, columns, flips = found.T
    assert set(rows) == set(columns) == set(range(9))
    assert abs(flips.mean() - 0.5) < 0.15  # 5 standard deviations
    assert np.abs(np.corrcoef(found.T) - np.eye(3)).max() < 0.3


def test_augmentation_is_determined_by_the_key():
    images, augment = pixels(8), augmenting().augment
    first = augment(jax.random.key(0), images)
    np.testing.assert_array_equal(first, augment(jax.random.key(0), images))
    assert (first != augment(jax.random.key(1), images)).any()


def test_augmentation_is_the_same_under_jit():
    images, augment = pixels(8), augmenting().augment
    key = jax.random.key(0)
    np.testing.assert_array_equal(jax.jit(augment)(key, images), augment(key, images))


# Parts of a split.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train-00000-of-00002.parquet", "lacks train-00001-of-00002.parquet"),
        ("deeper/train-00000-of-00002.parquet", "has parts twice or too many"),
        ("train-00002-of-00003.parquet", "lacks train-00000-of-00003.parquet"),
        ("train-00000-of-00001.parquet", "has parts twice or too many"),
        ("train-copy.parquet", "train-copy.parquet is one of 3 files of the train split"),
    ],
)
def test_a_split_of_missing_or_doubled_parts_is_refused(folder, name, message):
    parts = folder / "plain_text"
    if message.startswith("lacks train-00001"):
        (parts / "train-00001-of-00002.parquet").unlink()
    else:
        (parts / name).parent.mkdir(exist_ok=True)
        shutil.copy(parts / "train-00000-of-00002.parquet", parts / name)
    with pytest.raises(ValueError, match=message):
        data.cifar10(folder)


def test_one_file_of_any_name_is_a_split(folder):
    parts = folder / "plain_text"
    (parts / "train-00001-of-00002.parquet").unlink()
    (parts / "train-00000-of-00002.parquet").rename(parts / "train-all.parquet")
    assert len(data.cifar10(folder).train.labels) == 3


def test_other_images_are_another_run(folder):
    config = Config(dataset="cifar10", data_dir=folder)
    before = config.options
    assert Config(dataset="cifar10", data_dir=folder).options == before
    parquet.write_table(valid(3, seed=9), broken(folder))
    assert config.options != before
