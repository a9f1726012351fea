"""Convolutions in the one form that a CPU computes quickly wherever they stand."""

import functools
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
    """TODO."""

    @functools.wraps(fun)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> T:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [x for x in leaves if isinstance(x, jax.Array)]
        fill: Callable[[Iterable[Any]], T]

        def flat(*arrays: jax.Array) -> list[Any]:
            nonlocal fill
            given = iter(arrays)
            filled = [next(given) if isinstance(x, jax.Array) else x for x in leaves]
            args, kwargs = jax.tree.unflatten(treedef, filled)
            computed, fill = losses.split(fun(*args, **kwargs))
            return computed

        closed = jax.make_jaxpr(flat)(*arrays)
        run = core.jaxpr_as_fun(core.ClosedJaxpr(_canonical(closed.jaxpr), closed.consts))
        return fill(run(*arrays))

    return rewritten


# What was rewritten, so that a jitted function is compiled once, however often it is called.
# None for what stayed the same, which would otherwise keep itself in memory.
_known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _canonical(jaxpr: core.Jaxpr) -> core.Jaxpr:
    if jaxpr not in _known:
        parts = list(map(_rewritten, jaxpr.eqns))
        is_same = all(part[0] is eqn for part, eqn in zip(parts, jaxpr.eqns, strict=True))
        _known[jaxpr] = None if is_same else jaxpr.replace(eqns=[e for part in parts for e in part])
    found: core.Jaxpr | None = _known[jaxpr]
    return jaxpr if found is None else found


def _rewritten(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    if eqn.primitive.name == "conv_general_dilated":
        return _spelt_out(eqn)
    params = {name: _inside(param) for name, param in eqn.params.items()}
    is_same = all(param is eqn.params[name] for name, param in params.items())
    return [eqn if is_same else eqn.replace(params=params)]


def _inside(param: Any) -> Any:
    """Rewrite the functions that a parameter of an equation holds."""
    if isinstance(param, core.ClosedJaxpr):
        jaxpr = _canonical(param.jaxpr)
        return param if jaxpr is param.jaxpr else core.ClosedJaxpr(jaxpr, param.consts)
    if isinstance(param, core.Jaxpr):
        return _canonical(param)
    if type(param) is tuple:
        found = tuple(map(_inside, param))
        return found if any(a is not b for a, b in zip(found, param, strict=True)) else param
    return param


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

    closed = jax.make_jaxpr(
        lambda *args: jax.lax.platform_dependent(*args, cpu=canonical, default=as_it_is)
    )(*(v.aval for v in eqn.invars))
    jaxpr = closed.jaxpr
    names = dict(
        zip([*jaxpr.invars, *jaxpr.outvars], [*eqn.invars, *eqn.outvars], strict=True)
    )

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
        for x, own, asked in zip((image, kernel), dimension_numbers, form)
    )
    if batch_group_count > 1:
        # Each group of examples has outputs of its own: as if they were groups of features.
        size = image.shape[0] // batch_group_count
        each = image.reshape(batch_group_count, size, *image.shape[1:])
        each = jnp.moveaxis(each, 0, -2)
        image = each.reshape(*each.shape[:-2], -1)
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
