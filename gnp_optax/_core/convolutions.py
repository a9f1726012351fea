"""Convolutions in the one form that a CPU computes quickly wherever they stand."""

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core

from gnp_optax._core import losses

P = ParamSpec("P")
T = TypeVar("T")


def canonical_convolutions(fun: Callable[P, T]) -> Callable[P, T]:
    """Let a CPU compute convolutions as quickly inside a loop or a branch as outside.

    Eigen, which computes convolutions on a CPU, knows one form, `b01f_01io->b01f`: batch, space,
    features. The gradients of a convolution are convolutions of other forms. XLA rewrites them, but
    only outside `lax.scan`, `lax.cond` and `lax.while_loop`; inside, they become plain loops, ten
    to forty times slower. And a few large groups, of features or of the batch, it rewrites so that
    they are ten times slower anywhere. (A group for each feature becomes a third slower by this.)

    The function that is returned computes the same with each convolution in that form, between
    transpositions: in the functions that it calls, in checkpoints, loops, branches and custom
    derivatives, too. On other platforms convolutions stay what they are, which is decided when
    the program is compiled for one. What `gnp.value_and_grad` and the transformations put into a
    branch themselves, the second gradient of a traced alpha, is written in this way already.

    Apply it to what differentiates, not to the loss, since the convolutions of a gradient are not
    there before; to what is inside `jax.shard_map`, whose body is left as it is; and put `jax.jit`
    around it:

        epoch = jax.jit(gnp.canonical_convolutions(lambda *args: jax.lax.scan(step, *args)))

    Args:
        fun: Any function that JAX can trace. Its arguments may be anything; arrays among their
            leaves are traced, so that Python does not see their values, as under `jax.jit`.

    Returns:
        A function of the same arguments and results, to rounding: groups are summed in another
        order, everything else is the same to the bit. It can be compiled, differentiated and mapped
        like any other.

    Raises:
        Exception: As `fun`.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss(kernel, images):
        ...     return jnp.sum(jax.lax.conv(images, kernel, (1, 1), "SAME") ** 2)
        >>> kernel, images = jnp.ones((4, 3, 3, 3)), jnp.ones((2, 3, 8, 8))
        >>> program = jax.jit(canonical_convolutions(jax.grad(loss))).lower(kernel, images)
        >>> "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in program.as_text()
        True
    """

    @functools.wraps(fun)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> T:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        is_traced = [isinstance(x, jax.Array) for x in leaves]
        arrays = [x for x, traced in zip(leaves, is_traced, strict=True) if traced]
        fill: Callable[[Iterable[Any]], T]

        def flat(*arrays: jax.Array) -> list[Any]:
            nonlocal fill
            found = iter(arrays)
            given = [next(found) if t else x for x, t in zip(leaves, is_traced, strict=True)]
            args, kwargs = jax.tree.unflatten(treedef, given)
            computed, fill = losses.split(fun(*args, **kwargs))
            return computed

        canonical = core.jaxpr_as_fun(_rewritten(jax.make_jaxpr(flat)(*arrays)))
        return fill(canonical(*arrays))

    return rewritten


# The functions that were rewritten, so that one which is called again is not compiled again. None
# for what stays as it is, which would otherwise keep itself in memory.
_known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _rewritten(param: Any) -> Any:
    """Rewrite a function, or the functions that a parameter of an equation holds."""
    if type(param) is tuple:
        found = tuple(map(_rewritten, param))
        return param if _are_same(found, param) else found
    if not isinstance(param, (core.ClosedJaxpr, core.Jaxpr)):
        return param
    if param not in _known:
        eqns = [new for eqn in param.eqns for new in _equations(eqn)]
        _known[param] = None if _are_same(eqns, param.eqns) else _with_equations(param, eqns)
    return param if _known[param] is None else _known[param]


def _are_same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _with_equations(closed: Any, eqns: list[core.JaxprEqn]) -> Any:
    if isinstance(closed, core.ClosedJaxpr):
        return core.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)
    return closed.replace(eqns=eqns)


def _equations(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    if eqn.primitive.name == "conv_general_dilated":
        return _spelt_out(eqn)
    # What varies over which devices is known inside `shard_map` alone.
    if eqn.primitive.name == "shard_map":
        return [eqn]
    params = {name: _rewritten(param) for name, param in eqn.params.items()}
    is_same = _are_same([*params.values()], [*eqn.params.values()])
    return [eqn if is_same else eqn.replace(params=params)]


def _spelt_out(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Return the convolution in the one form, between transpositions."""
    numbers, groups = (eqn.params[name] for name in ("dimension_numbers", "batch_group_count"))
    if numbers == _form(len(numbers.lhs_spec)) and groups == 1:
        return [eqn]

    def as_it_is(*operands: jax.Array) -> jax.Array:
        result: jax.Array = eqn.primitive.bind(*operands, **eqn.params)
        return result

    def canonical(*operands: jax.Array) -> jax.Array:
        return _convolution(*operands, **eqn.params)

    jaxpr = jax.make_jaxpr(
        lambda *args: jax.lax.platform_dependent(*args, cpu=canonical, default=as_it_is)
    )(*(v.aval for v in eqn.invars)).jaxpr
    for branch in (b for part in jaxpr.eqns for b in part.params.get("branches", ())):
        _known[branch] = None
    names = dict(zip([*jaxpr.invars, *jaxpr.outvars], [*eqn.invars, *eqn.outvars], strict=True))

    def named(atoms: Sequence[Any]) -> list[Any]:
        return [v if isinstance(v, core.Literal) else names.get(v, v) for v in atoms]

    return [
        part.replace(
            invars=named(part.invars),
            outvars=named(part.outvars),
            source_info=eqn.source_info,
            ctx=eqn.ctx,
        )
        for part in jaxpr.eqns
    ]


def _form(ndim: int) -> jax.lax.ConvDimensionNumbers:
    """Return the one form: `b01f_01io->b01f`, and so on for other numbers of axes."""
    last, *spatial = ndim - 1, *range(1, ndim - 1)
    image = (0, last, *spatial)
    return jax.lax.ConvDimensionNumbers(image, (last, last - 1, *range(last - 1)), image)


def _convolution(
    image: jax.Array,
    kernel: jax.Array,
    *,
    dimension_numbers: Any,
    batch_group_count: int,
    feature_group_count: int,
    **options: Any,
) -> jax.Array:
    form = _form(image.ndim)
    image, kernel = (
        jnp.transpose(x, _order(own, asked))
        for x, own, asked in zip((image, kernel), dimension_numbers[:2], form[:2], strict=True)
    )
    if batch_group_count > 1:
        # Each group of examples has outputs of its own: as if they were groups of features.
        batch, *spatial, features = image.shape
        size = batch // batch_group_count
        each = image.reshape(batch_group_count, size, *spatial, features)
        image = jnp.moveaxis(each, 0, -2).reshape(size, *spatial, batch_group_count * features)
    result = jax.lax.conv_general_dilated(
        image,
        kernel,
        dimension_numbers=form,
        feature_group_count=feature_group_count * batch_group_count,
        **options,
    )
    return jnp.transpose(result, _order(form.out_spec, dimension_numbers.out_spec))


def _order(own: Sequence[int], asked: Sequence[int]) -> list[int]:
    """Return the order of axes, named by one specification, that makes it the other."""
    return [own[asked.index(i)] for i in range(len(asked))]
