"""The kinds of masks: hashable, and equal by value."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._core import checks, numerics, paths, selection

PyTree = Any


def by_path(regex: str) -> Callable[[PyTree], PyTree]:
    r"""Select the leaves whose path matches a regular expression.

    A leaf's path is its keys joined by `/`, such as `encoder/block_3/attention/kernel`. It is the
    same for linen, NNX, Equinox and plain pytrees: an index below a name is written as linen names
    the items of a list, `blocks_0/kernel`. As in `re.search`, a match anywhere in the path counts;
    anchor with `^` and `$`.

    Args:
        regex: Regular expression, in the syntax of `re`.

    Returns:
        A mask: hashable, equal to every other `by_path` of the same expression.

    Raises:
        ValueError: If `regex` is no regular expression; and later, where the mask is used, if it
            matches no leaf.

    Example:
        >>> params = {"body": [{"w": 1.0}, {"w": 2.0}], "head": {"w": 3.0, "b": 4.0}}
        >>> by_path(r"^(head|body_1)/")(params)
        {'body': [{'w': False}, {'w': True}], 'head': {'b': True, 'w': True}}
    """
    return ByPath(regex)


def layers(*paths: str) -> Callable[[PyTree], PyTree]:
    """Select whole layers by name: what `top_k_layers` returns, for a selection known beforehand.

    A layer is a module's own parameters: the leaves that share a path up to the last `/`.

    Args:
        *paths: Paths of modules, such as `"blocks_3/mlp"`; `""` is the outermost module.

    Returns:
        A mask: hashable, equal to every other `layers` of the same paths in whatever order, and
        printed as it is written.

    Raises:
        ValueError: Where the mask is used, if the parameters lack one of the layers.

    Example:
        >>> layers("head")({"body": {"w": 1.0}, "head": {"w": 2.0, "b": 3.0}})
        {'body': {'w': False}, 'head': {'b': True, 'w': True}}
    """
    return Layers(tuple(sorted(set(paths))))


def matrices() -> Callable[[PyTree], PyTree]:
    """Select the leaves with two or more dimensions: kernels and embeddings, not biases or scales.

    Returns:
        A mask: hashable, equal to every other `matrices()`.

    Example:
        >>> import jax.numpy as jnp
        >>> matrices()({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
    """
    return Matrices()


def stacked(regex: str, *, last: int, axis: int = 0) -> Callable[[PyTree], PyTree]:
    """Select the last layers of leaves that stack layers along an axis, for `lax.scan`.

    With prefix sharing the loop is cut: the first layers are computed once. That goes for a
    `lax.scan` over the stacks and for a `lax.fori_loop` that picks layers by index; before, the
    stacks may be joined, divided into groups, or changed layer by layer.

    Args:
        regex: The leaves whose path matches, as in `by_path`: all of one stack.
        last: How many of the layers.
        axis: Along which axis the layers are stacked: 1 for `nn.scan(variable_axes={"params": 1})`
            in Flax, and for `param_scan_axis=1` in MaxText.

    Returns:
        A mask: hashable, equal to every other `stacked` of the same arguments.

    Raises:
        ValueError: If `regex` is no regular expression, `last` less than 1 or `axis` less than 0;
            where the mask is used, if the matching leaves do not have one number of layers along
            the axis, and at least `last`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"blocks": jnp.zeros((3, 4, 4)), "head": jnp.zeros((4, 2))}
        >>> mask = stacked("^blocks", last=2) | by_path("^head")
        >>> mask(params)
        {'blocks': array([False,  True,  True]), 'head': True}
    """
    checks.check_integer("last", last, at_least=1)
    checks.check_integer("axis", axis, at_least=0)
    return Stacked(regex, int(last), int(axis))


class Mask:
    """A callable from the parameters to a pytree of bools."""

    def __call__(self, params: PyTree) -> PyTree:
        """Return whether each leaf is selected, or which of the layers that it stacks."""
        raise NotImplementedError

    def __or__(self, other: Any) -> "Union":
        return _joined(Union, self, other)

    def __and__(self, other: Any) -> "Intersection":
        return _joined(Intersection, self, other)

    def __invert__(self) -> "Mask":
        return self.mask if isinstance(self, Complement) else Complement(self)


@dataclasses.dataclass(frozen=True, repr=False)
class Union(Mask):
    """What any of some masks selects."""

    masks: frozenset[Mask]

    def __call__(self, params: PyTree) -> PyTree:
        """Return whether each leaf is selected."""
        return _leaf_by_leaf(np.logical_or.reduce, *(mask(params) for mask in self.masks))

    def __repr__(self) -> str:
        return " | ".join(sorted(map(repr, self.masks)))


@dataclasses.dataclass(frozen=True, repr=False)
class Intersection(Mask):
    """What all of some masks select."""

    masks: frozenset[Mask]

    def __call__(self, params: PyTree) -> PyTree:
        """Return whether each leaf is selected."""
        return _leaf_by_leaf(np.logical_and.reduce, *(mask(params) for mask in self.masks))

    def __repr__(self) -> str:
        return " & ".join(
            sorted(f"({m!r})" if isinstance(m, Union) else repr(m) for m in self.masks)
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Complement(Mask):
    """What a mask does not select."""

    mask: Mask

    def __call__(self, params: PyTree) -> PyTree:
        """Return whether each leaf is selected."""
        return _leaf_by_leaf(lambda flags: np.logical_not(*flags), self.mask(params))

    def __repr__(self) -> str:
        is_several = isinstance(self.mask, (Union, Intersection))
        return f"~({self.mask!r})" if is_several else f"~{self.mask!r}"


Several = TypeVar("Several", Union, Intersection)


def _joined(kind: type[Several], first: Mask, second: Any) -> Several:
    if not isinstance(second, Mask):
        return NotImplemented
    # Flat, so that a selection is the same mask in whatever order it was put together.
    each = (mask.masks if isinstance(mask, kind) else {mask} for mask in (first, second))
    return kind(frozenset().union(*each))


def _leaf_by_leaf(combine: Callable[..., Any], *selections: PyTree) -> PyTree:
    """Combine selections: of each leaf a bool, or one for each of the layers that it stacks."""

    def of_leaf(*flags: Any) -> Any:
        axes = sorted({np.ndim(flag) - 1 for flag in flags if np.ndim(flag)})
        if len(axes) > 1:
            raise ValueError(
                f"The joined masks select layers of the same leaf along different axes, "
                f"{axes[0]} and {axes[1]}. Write the axis that its layers are stacked along in "
                f"each: gnp.masks.stacked('...', last=1, axis={axes[1]})."
            )
        found = combine(np.broadcast_arrays(*flags))
        return found if np.ndim(found) else bool(found)

    return jax.tree.map(of_leaf, *selections)


@dataclasses.dataclass(frozen=True, repr=False)
class ByPath(Mask):
    """Leaves whose path matches."""

    regex: str

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_regex("by_path", self.regex)

    def __call__(self, params: PyTree) -> PyTree:
        """Return whether each leaf is selected."""
        return _tree_of(params, [bool(re.search(self.regex, path)) for path in _paths_of(params)])

    def __repr__(self) -> str:
        return f"by_path({self.regex!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class Stacked(Mask):
    """The last of the layers that the matching leaves stack."""

    regex: str
    last: int
    axis: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_regex("stacked", self.regex)

    def __call__(self, params: PyTree) -> PyTree:
        """Return whether each leaf is selected."""
        leaves = list(zip(_paths_of(params), jax.tree.leaves(params), strict=True))
        shapes = {
            path: jnp.shape(leaf)
            for path, leaf in leaves
            # Others are never perturbed, such as a stack of random keys.
            if re.search(self.regex, path) and numerics.is_inexact(leaf)
        }
        if not shapes:
            return _tree_of(params, [False] * len(leaves))
        layers = self._layers(shapes)
        flags = selection.along(self.axis, np.arange(layers) >= layers - self.last)
        return _tree_of(params, [flags if path in shapes else False for path, _ in leaves])

    def _layers(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many layers the leaves stack."""
        by_layers: dict[int, str] = {}
        for path, shape in shapes.items():
            by_layers.setdefault(_length(shape, self.axis), path)
        if len(by_layers) == 1 and self.last <= min(by_layers):
            return min(by_layers)
        examples = (f"{path!r} has the shape {shapes[path]}" for path in by_layers.values())
        raise ValueError(
            f"{self!r} selects {self.last} stacked layers, but {', '.join(examples)}. All leaves "
            f"that match must have the same number of layers along axis {self.axis}, and as many "
            f"as are selected. {self._advice(list(shapes.values()))}"
        )

    def _advice(self, shapes: Sequence[tuple[int, ...]]) -> str:
        advice = (
            f"Of several stacks match each alone, with ^ and $, and join them: "
            f"stacked('^encoder/', last={self.last}) | stacked('^decoder/', last={self.last})."
        )
        for axis in range(min(map(len, shapes))):
            lengths = {_length(shape, axis) for shape in shapes}
            if len(lengths) == 1 and self.last <= lengths.pop():
                another = dataclasses.replace(self, axis=axis)
                return f"If the layers are stacked along axis {axis}: {another!r}. {advice}"
        return advice

    def __repr__(self) -> str:
        axis = f", axis={self.axis}" if self.axis else ""
        return f"stacked({self.regex!r}, last={self.last}{axis})"


def _length(shape: tuple[int, ...], axis: int) -> int:
    return shape[axis] if axis < len(shape) else 0


@dataclasses.dataclass(frozen=True, repr=False)
class Matrices(Mask):
    """Leaves with two or more dimensions."""

    def __call__(self, params: PyTree) -> PyTree:
        """Return whether each leaf is selected."""
        _check_params(params)
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)

    def __repr__(self) -> str:
        return "matrices()"


@dataclasses.dataclass(frozen=True, repr=False)
class Layers(Mask):
    """The leaves of some modules."""

    paths: tuple[str, ...]

    def __call__(self, params: PyTree) -> PyTree:
        """Return whether each leaf is selected."""
        owners = [paths.layer_of(path) for path in _paths_of(params)]
        present = set(owners)
        missing = [layer for layer in self.paths if layer not in present]
        if missing:
            raise ValueError(
                f"The mask names layers that the parameters do not have: "
                f"{checks.listed(missing)}. They have {checks.listed(sorted(present))}. "
                f"Select again with the gradient of these parameters."
            )
        return _tree_of(params, [owner in self.paths for owner in owners])

    def __repr__(self) -> str:
        return f"layers({', '.join(map(repr, self.paths))})"


def _check_regex(name: str, regex: str) -> None:
    try:
        re.compile(regex)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}({regex!r}) is no regular expression: {error}.") from error


def _paths_of(params: PyTree) -> list[str]:
    _check_params(params)
    return paths.leaf_paths(params)


def _tree_of(params: PyTree, selected: Sequence[bool | np.ndarray]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(params), selected)


def _check_params(params: PyTree) -> None:
    checks.check_parameters(params)
    # `optax.inject_hyperparams` takes every callable for a schedule and calls it with its count.
    if isinstance(params, (int, np.ndarray, jax.Array)) and not numerics.is_inexact(params):
        raise ValueError(selection.MASK_AS_SCHEDULE)
