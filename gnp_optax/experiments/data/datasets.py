"""The data sets, and augmentation on device."""

import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class Split(NamedTuple):
    """Examples, uint8: images of shape (n, height, width, channels), or texts of shape (n, length).

    The labels have the shape (n,), or for every character the one that follows: (n, length).
    """

    images: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    """A data set; pixels are normalised to `(pixel / scale - mean) / std`, per channel.

    Those of a text, which has no `mean`, are the numbers of its characters.
    """

    train: Split
    test: Split
    validation: Split
    classes: int = 10
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augmented: bool = False

    def normalize(self, images: jax.Array) -> jax.Array:
        """Turn uint8 pixels into float32 of about zero mean and unit variance."""
        if not self.mean:
            return images.astype(jnp.int32)
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return (images.astype(jnp.float32) / self.scale - mean) / std

    def augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Pad by an eighth of reflected pixels, crop at random, flip half of the images."""
        if not self.augmented:
            return images
        batch, side = images.shape[0], images.shape[1]
        crop_key, flip_key = jax.random.split(key)
        margin = side // 8  # 4 of 32 pixels
        padded = jnp.pad(images, ((0, 0), *[(margin, margin)] * 2, (0, 0)), mode="reflect")
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * margin + 1)

        def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
            start = (corner[0], corner[1], 0)
            return jax.lax.dynamic_slice(image, start, (side, side, image.shape[-1]))

        cropped = jax.vmap(crop)(padded, corners)
        flips = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        return jnp.where(flips, cropped[:, :, ::-1], cropped)


def whole(train: Split, test: Split, **options: Any) -> Data:
    """Return a data set of which nothing has been set apart for validation."""
    return Data(train, test, Split(*(x[:0] for x in train)), **options)


def part_of(data: Data, part: tuple[int, int], first: int | None = None) -> Data:
    """Take the first so many training examples, and of these i, i + n, i + 2 n and so on."""
    return data._replace(train=Split(*(x[:first][part[0] :: part[1]] for x in data.train)))


def set_apart(data: Data, count: int) -> Data:
    """Take examples for validation from the training set, in an order that is always the same.

    Those of a text are its last ones: what is near to them in the text is not among them.
    """
    examples = len(data.train.labels)
    if not 0 <= count < examples:
        raise ValueError(f"--validation-examples must be fewer than {examples}, got {count}.")
    is_text = not data.mean
    order = np.arange(examples) if is_text else np.random.default_rng(0).permutation(examples)
    chosen, left = np.sort(order[examples - count :]), np.sort(order[: examples - count])
    validation, train = (Split(*(x[rows] for x in data.train)) for rows in (chosen, left))
    return data._replace(train=train, validation=validation)


def halved(data: Data, size: int) -> Data:
    """Return images of another side, means over squares of pixels."""

    def of_split(split: Split) -> Split:
        images = np.asarray(split.images)
        n, side, _, channels = images.shape
        k = side // size
        means = images.reshape(n, size, k, size, k, channels).mean((2, 4))
        return split._replace(images=jnp.asarray(means.round(), jnp.uint8))

    return data._replace(train=of_split(data.train), test=of_split(data.test))


def noisy(labels: jax.Array, index: jax.Array, seed: Any, noise: float, classes: int) -> jax.Array:
    """Replace each label with the probability `noise` by that of another class.

    Which, and by what, depends on the seed and on the number of the example in the training set,
    `index`, alone.
    """
    key = jax.random.fold_in(jax.random.key(2_024), seed)

    def replaced(label: jax.Array, i: jax.Array) -> jax.Array:
        coin, other = jax.random.split(jax.random.fold_in(key, i))
        wrong = (label + jax.random.randint(other, (), 1, classes)) % classes
        return jnp.where(jax.random.uniform(coin) < noise, wrong, label).astype(label.dtype)

    return jnp.vectorize(replaced)(labels, index)


def of_classes(data: Data, classes: tuple[int, ...]) -> Data:
    """Return the examples of some of the classes, which are numbered anew from 0."""
    if not classes or set(classes) - set(range(data.classes)) or len(set(classes)) < len(classes):
        raise ValueError(
            f"--classes must be some of 0 to {data.classes - 1}, each once: {classes}."
        )

    def chosen(split: Split) -> Split:
        kept = np.isin(split.labels, classes)
        labels = np.argmax(np.asarray(split.labels)[kept, None] == np.asarray(classes), axis=1)
        return Split(split.images[kept], jnp.asarray(labels, split.labels.dtype))

    return data._replace(train=chosen(data.train), test=chosen(data.test), classes=len(classes))


def digits(part: tuple[int, int] = (0, 1)) -> Data:
    """Load scikit-learn's handwritten digits: 1797 images of 8x8, a third of them for testing.

    With `part` (i, n), of the training images only i, i + n, i + 2 n and so on.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    splits = train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, splits)
    train, test = Split(train_images, train_labels), Split(test_images, test_labels)
    return part_of(whole(train, test, scale=16.0, mean=(0.3053,), std=(0.3760,)), part)


def cifar10(data_dir: Path | None, part: tuple[int, int] = (0, 1)) -> Data:
    """Load CIFAR-10 from Parquet files in the layout of the hub's `uoft-cs/cifar10`.

    Args:
        data_dir: A folder with `train-*.parquet` and `test-*.parquet`, at any depth. `None`
            downloads the data set from the Hugging Face hub.
        part: `(i, n)`: of the training images, decode only i, i + n, i + 2 n and so on.

    Raises:
        FileNotFoundError: If the folder or a split is missing.
        ConnectionError: If the hub cannot be reached.
        ValueError: If a file is corrupt or has other columns.
    """
    folder = _download() if data_dir is None else data_dir
    if not folder.is_dir():
        raise FileNotFoundError(f"--data-dir: there is no folder {folder}.")
    train, test = _read_split(folder, "train", part), _read_split(folder, "test", (0, 1))
    return whole(train, test, scale=255.0, mean=CIFAR10_MEAN, std=CIFAR10_STD, augmented=True)


def text(data_dir: Path | None, length: int, part: tuple[int, int] = (0, 1)) -> Data:
    """Load a text as examples of `length` characters; the last tenth of it is for testing.

    Args:
        data_dir: A folder with `*.txt` files, which are joined in the order of their names.
        length: Characters of an example.
        part: As in `cifar10`.

    Raises:
        FileNotFoundError: If there is no such folder or no text in it.
        ValueError: If the text is too short, or has more than 256 different characters.
    """
    files = sorted(data_dir.glob("*.txt")) if data_dir else []
    if not files:
        raise FileNotFoundError(
            f"--dataset text needs --data-dir, a folder with *.txt: {data_dir}."
        )
    characters = list("".join(map(_read_text, files)))
    vocabulary, numbers = np.unique(characters, return_inverse=True)
    if len(vocabulary) > 256:
        raise ValueError(f"The text has {len(vocabulary)} different characters, more than 256.")
    test_start = len(numbers) * 9 // 10

    def examples(numbers: np.ndarray) -> Split:
        count = (len(numbers) - 1) // length
        if count < 1:
            raise ValueError(f"A text of {len(characters)} characters is too short.")
        rows = numbers.astype(np.uint8)
        inputs, targets = (rows[i : i + count * length].reshape(count, length) for i in (0, 1))
        return Split(jnp.asarray(inputs), jnp.asarray(targets))

    train, test = examples(numbers[:test_start]), examples(numbers[test_start:])
    return part_of(whole(train, test, classes=len(vocabulary)), part)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}.") from error


def _download() -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download("uoft-cs/cifar10", repo_type="dataset", allow_patterns="*.parquet")
    except Exception as error:  # the hub's client raises errors of many libraries
        raise ConnectionError(
            f"Could not download uoft-cs/cifar10 from the Hugging Face hub ({error}). With the "
            f"Parquet files in a local folder, pass --data-dir FOLDER."
        ) from error
    return Path(path)


def _read_split(folder: Path, name: str, part: tuple[int, int]) -> Split:
    from pyarrow import parquet

    files = sorted(folder.rglob(f"{name}-*.parquet"))
    _check_shards(folder, name, files)
    images: list[np.ndarray] = []
    labels: list[int] = []
    seen, (first, stride) = 0, part
    for file in files:
        try:
            table = parquet.read_table(file)
        except Exception as error:  # PyArrow raises errors of many kinds
            raise ValueError(f"{file} is not a readable Parquet file: {error}") from error
        if not {"img", "label"} <= set(table.column_names):
            raise ValueError(
                f"{file} has the columns {table.column_names}; needed are 'img' (a struct with "
                f"the encoded image in 'bytes') and 'label'."
            )
        for row, (image, label) in enumerate(
            zip(table["img"].to_pylist(), table["label"].to_pylist(), strict=True)
        ):
            if type(label) is not int or not 0 <= label < 10:
                raise ValueError(
                    f"{file}, row {row}: labels must be integers from 0 to 9, got {label}."
                )
            if (seen + row) % stride == first:
                images.append(_decode(image, file, row))
                labels.append(label)
        seen += len(table)
    if not images:
        raise ValueError(f"The {name} split under {folder} is empty.")
    return Split(jnp.asarray(np.stack(images)), jnp.asarray(labels, jnp.int32))


def _check_shards(folder: Path, name: str, files: list[Path]) -> None:
    """Raise unless the files are all parts of a split, each of them once."""
    if not files:
        raise FileNotFoundError(f"--data-dir: there is no {name}-*.parquet under {folder}.")
    numbered = [re.fullmatch(r".*-(\d+)-of-(\d+)(?:-[0-9a-f]+)?", file.stem) for file in files]
    if len(files) == 1 and numbered[0] is None:
        return
    strange = [str(f) for f, match in zip(files, numbered, strict=True) if match is None]
    if strange:
        raise ValueError(
            f"--data-dir: {strange[0]} is one of {len(files)} files of the {name} split, but not "
            f"named as a part of it, such as {name}-00000-of-00002.parquet. Rename or remove it."
        )
    parts = [tuple(map(int, match.groups())) for match in numbered if match]
    counts = {count for _, count in parts}
    expected = [(i, n) for n in sorted(counts) for i in range(n)]
    if len(counts) > 1 or sorted(parts) != expected:
        missing = [f"{name}-{i:05}-of-{n:05}.parquet" for i, n in expected if (i, n) not in parts]
        wrong = f"lacks {', '.join(missing[:3])}" if missing else "has parts twice or too many"
        raise ValueError(
            f"--data-dir: the {name} split under {folder} {wrong}. Its files are "
            f"{', '.join(str(file.relative_to(folder)) for file in files[:6])}."
        )


def _decode(image: object, file: Path, row: int) -> np.ndarray:
    from PIL import Image

    if not (isinstance(image, dict) and isinstance(image.get("bytes"), bytes)):
        raise ValueError(f"{file}, row {row}: 'img' must be a struct with 'bytes'.")
    try:
        pixels = np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
    except Exception as error:  # Pillow raises errors of many kinds
        raise ValueError(f"{file}, row {row}: the image cannot be decoded: {error}") from error
    if pixels.shape != (32, 32, 3):
        raise ValueError(f"{file}, row {row}: the image is {pixels.shape}, not 32x32x3.")
    return pixels
