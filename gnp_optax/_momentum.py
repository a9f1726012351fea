"""SAM at one gradient a step: along what earlier gradients left behind, known before the pass."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp_optax._core import checks, nodes, numerics, paths, perturbation, selection, strength
from gnp_optax._core.selection import Mask

PyTree = Any


class MomentumSAMState(NamedTuple):
    """State of `momentum_sam`.

    Attributes:
        step: Number of updates so far, int32; the step that the next one is.
        momentum: m, the running mean of the gradients, in float32 or wider; nothing
            (`optax.MaskedNode`) in the place of a leaf that is not perturbed.
        momentum_norm: `||m||`, so that to perturb needs no sum over the devices.
        radius: rho of the next step.
        grad_norm: `||g||` of the last step over all leaves, float32.
        perturbation_norm: Norm of the change that `perturbed` makes to the parameters that the last
            update was given, rounded to their own types, float32. They will have moved by one step.
    """

    step: jax.Array
    momentum: PyTree
    momentum_norm: jax.Array
    radius: jax.Array
    grad_norm: jax.Array
    perturbation_norm: jax.Array


# The public home, which is also where a pickled optimizer state looks for it.
MomentumSAMState.__module__ = "gnp_optax"


def momentum_sam(
    rho: optax.ScalarOrSchedule, decay: jax.typing.ArrayLike = 0.9, *, mask: Mask = None
) -> optax.GradientTransformation:
    """Minimize sharpness at one gradient a step, perturbing along what is remembered.

        eps_t = rho_t * m_{t-1} / ||m_{t-1}||        # on the leaves under `mask`; eps_0 = 0
        g_t   = grad L(theta_t + eps_t)              # the only gradient of the step
        m_t   = decay * m_{t-1} + (1 - decay) * g_t  # decay = 0: the last gradient

    Put it first in a chain, and take the gradient at `perturbed(params, opt_state)`:

        tx = optax.chain(gnp.momentum_sam(rho=0.1), optax.adamw(1e-3))
        value, grads = jax.value_and_grad(loss_fn)(gnp.perturbed(params, opt_state), x, y)
        updates, opt_state = tx.update(grads, opt_state, params)

    The gradients pass unchanged; the transformation remembers them, but none that is not finite.
    `params` are never the perturbed ones, so that evaluation and checkpoints are those of plain
    training. Value and aux are those at the perturbed parameters.

    A step that forgets `perturbed` is plain training, and can't be told from inside: the gradient
    does not say where it was taken. `gnp.diagnostics.check_perturbed(step, *arguments)` can tell.

    The perturbation ascends, as SAM's does. (Momentum-SAM's own code goes ahead along the descent.)
    With `~mask` here and `mask` in `gnp.value_and_grad`, all layers are perturbed at the price of
    a few: early ones along what is remembered, late ones along the fresh gradient.

    Args:
        rho: Radius of the perturbation, in the units of the parameters; a number or a schedule of
            this transformation's own step count. Not negative; where it is 0, `perturbed` returns
            the parameters to the bit. (Behind `optax.inject_hyperparams`, whose numbers come at the
            update, a step has the radius of the one before.)
        decay: Share of m that is kept, in [0, 1).
        mask: Which leaves are perturbed: `None` (all), a prefix pytree of Python bools, or a
            callable from the parameters to one (see `gnp.masks`). The norm is over these leaves.

    Returns:
        A transformation whose state is a `MomentumSAMState`: a copy of the leaves under the mask.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If rho is negative or decay not in [0, 1); if the mask selects nothing or does
            not fit the parameters; from `update`, if it is called without them.

    Example:
        >>> loss = lambda x: jnp.sum(x**2) / 2           # its gradient is x
        >>> params = jnp.array([3.0, 4.0])               # ||g|| = 5
        >>> tx = momentum_sam(rho=0.5, decay=0.0)
        >>> grads, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
        >>> [round(float(x), 4) for x in perturbed(params, state)]   # x + 0.5 g / ||g||
        [3.3, 4.4]

    References:
        Becker et al., "Momentum-SAM", 2024, arXiv 2401.12033 (with the other sign); with `decay=0`
        Ji et al., "A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient
        and Accurate Sparse Training", NeurIPS 2024.
    """
    checks.check_scalar_or_schedule("rho", rho)
    checks.check_share("decay", decay)
    selection.check_mask(mask)

    def init_fn(params: optax.Params) -> MomentumSAMState:
        zero, step = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32)
        # `optax.tree.map_params` calls `init` with a placeholder that has no leaves.
        momentum = _zeros(mask, params) if jax.tree.leaves(params) else params
        return MomentumSAMState(step, momentum, _norm(momentum), _at(rho, step), zero, zero)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MomentumSAMState]:
        state = _checked(state, params)
        grads = [g for g in jax.tree.leaves(updates) if numerics.is_inexact(g)]
        grad_norm = jnp.asarray(numerics.norm(grads), jnp.float32)
        # One gradient that is not finite would else spoil all steps to come.
        is_finite = jnp.isfinite(grad_norm)
        momentum = _averaged(state.momentum, updates, params, mask, decay, is_finite)
        step = jnp.asarray(optax.safe_increment(state.step))
        following = MomentumSAMState(
            step, momentum, _norm(momentum), _at(rho, step), grad_norm, grad_norm
        )
        moved = _change(params, perturbed(params, following))
        return updates, following._replace(perturbation_norm=moved)

    return optax.GradientTransformation(init_fn, update_fn)


def perturbed(
    params: PyTree, opt_state: PyTree, *, perturb_dtype: jax.typing.DTypeLike | None = None
) -> PyTree:
    """Return the parameters at which a step of `momentum_sam` takes its gradient.

    `theta + rho m / ||m||`, computed in float32 or wider; leaves that are not perturbed are the
    same arrays. For models there are `linen.TrainState.perturbed_params`,
    `nnx.perturbed(model, optimizer)` and `equinox.perturbed(model, opt_state)`.

    Args:
        params: The parameters.
        opt_state: The optimizer state, with that of `momentum_sam` anywhere inside: in a chain,
            behind `optax.MultiSteps` (all micro-batches of a batch then are perturbed alike),
            `optax.inject_hyperparams`, `optax.apply_if_finite`.
        perturb_dtype: Return the perturbed leaves in at least this type, such as `"float32"`. By
            default they are rounded to their own: of bfloat16, most would not move, which the
            state's `perturbation_norm` tells, beside `radius`. For a gradient of the parameters'
            own type, differentiate through it:
            `jax.grad(lambda p: loss_fn(gnp.perturbed(p, opt_state, perturb_dtype="float32")))`.

    Returns:
        The perturbed parameters; after `init`, and where the radius is 0, the parameters.

    Raises:
        TypeError: If a module stands in place of its parameters.
        ValueError: If the state has none of `momentum_sam`, or several; if the parameters are not
            those that it was made for.

    Example:
        >>> tx = optax.chain(momentum_sam(rho=0.1), optax.sgd(1.0))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> _, opt_state = tx.update({"w": jnp.array([0.0, 2.0])}, tx.init(params), params)
        >>> [round(float(x), 4) for x in perturbed(params, opt_state)["w"]]
        [3.0, 4.1]
    """
    checks.check_perturb_dtype(perturb_dtype, "finite_difference")
    checks.check_parameters(params)
    state = _found(opt_state)
    leaves, structure = jax.tree.flatten(params)
    momentum = _of_leaves(state.momentum, params)

    def moved(w: Any, m: Any) -> Any:
        if _is_absent(m):
            return w
        dtype = perturbation.perturbed_type(w, perturb_dtype)
        direction = numerics.divide(m, state.momentum_norm)
        there = perturbation.perturb(w, direction, state.radius, dtype)
        # To the bit where nothing is added: of -0 a sum would make 0, of a mean that is NaN NaN.
        stays = (state.radius == 0) | (direction == 0)
        return jnp.where(stays, jnp.asarray(w, dtype), there)

    return jax.tree.unflatten(structure, [moved(*x) for x in zip(leaves, momentum, strict=True)])


def _found(opt_state: PyTree) -> MomentumSAMState:
    """Return the one state of `momentum_sam` inside a state."""
    found = nodes.inside(opt_state, MomentumSAMState)
    if not found:
        raise ValueError(
            "There is no state of gnp.momentum_sam in this optimizer state. Put it first in the "
            "chain, tx = optax.chain(gnp.momentum_sam(rho=0.1), optax.adamw(1e-3)), and pass what "
            "tx.init(params) and tx.update(...) return: gnp.perturbed(params, opt_state)."
        )
    if len(found) > 1:
        raise ValueError(
            f"There are {len(found)} states of gnp.momentum_sam in this optimizer state, and the "
            f"parameters can be perturbed by one. For several radii chain one of them, or pass the "
            f"part of the state that is meant: gnp.perturbed(params, opt_state[0])."
        )
    return found[0]


def _checked(state: Any, params: Any) -> MomentumSAMState:
    """Return the state, or raise for what can't be updated."""
    checks.check_parameters(params)
    if params is None:
        raise ValueError(
            "momentum_sam perturbs the parameters and needs them, those that are not perturbed: "
            "tx.update(grads, opt_state, params)."
        )
    if not isinstance(state, MomentumSAMState):
        raise TypeError(
            f"The optimizer state has {type(state).__name__} where MomentumSAMState should be. A "
            f"checkpoint has to be restored into the structure of tx.init(params)."
        )
    return state


def _zeros(mask: Mask, params: PyTree) -> PyTree:
    selected = selection.selected_leaves(mask, params)
    flags = jax.tree.unflatten(jax.tree.structure(params), [bool(np.any(s)) for s in selected])

    def zeros(node: Any, flags: Any) -> Any:
        # A Flax variable as a whole: before Flax 0.12 `nnx.Optimizer` takes none that holds a node.
        if not any(jax.tree.leaves(flags)):
            return optax.MaskedNode()
        # Of the parameter, so that it is sharded as that is.
        return jax.tree.map(lambda w: jnp.zeros_like(w, numerics.wide(jnp.result_type(w))), node)

    return jax.tree.map(zeros, params, flags, is_leaf=paths.is_box)


@numerics.promoting
def _averaged(
    momentum: PyTree,
    grads: PyTree,
    params: PyTree,
    mask: Mask,
    decay: jax.typing.ArrayLike,
    is_finite: jax.Array,
) -> PyTree:
    """Return `decay m + (1 - decay) g` on the leaves under the mask; m if g is not finite."""

    def mean(m: Any, g: Any, selected: bool | np.ndarray, path: str) -> Any:
        if g is None:
            raise ValueError(f"The gradient has nothing for {path!r}, which is perturbed.")
        # `jax.grad` returns the conjugate of the direction of steepest ascent.
        g = jnp.conj(jnp.asarray(g, m.dtype))
        if isinstance(selected, np.ndarray):  # which of the layers that the leaf stacks
            g = jnp.where(np.expand_dims(selected, tuple(range(selected.ndim, g.ndim))), g, 0)
        kept = jnp.asarray(decay, numerics.real(m.dtype))
        return jnp.where(is_finite, kept * m + (1 - kept) * g, m)

    of_leaves = zip(
        _of_leaves(momentum, params),
        selection.leaves_like(params, grads),
        selection.selected_leaves(mask, params),
        paths.leaf_paths(params),
        strict=True,
    )
    means = [mean(*each) for each in of_leaves if not _is_absent(each[0])]
    return jax.tree.unflatten(jax.tree.structure(momentum), means)


def _of_leaves(momentum: PyTree, params: PyTree) -> list[Any]:
    """Return what is remembered for each leaf, or that nothing is."""
    found: list[Any] = []
    outer: Any
    boxes, outer = jax.tree.flatten(params, is_leaf=paths.is_box)
    try:
        for box, m in zip(boxes, outer.flatten_up_to(momentum), strict=True):
            structure: Any = jax.tree.structure(box)
            absent = [m] * structure.num_leaves
            found += absent if _is_absent(m) else structure.flatten_up_to(m)
        shapes = [
            (jnp.shape(w), m.shape)
            for w, m in zip(jax.tree.leaves(params), found, strict=True)
            if not _is_absent(m)
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"These are not the parameters that the optimizer state was made for. Parameters: "
            f"{jax.tree.structure(params)}. State: {jax.tree.structure(momentum)}. Of an Equinox "
            f"model pass what tx.init was given: eqx.filter(model, eqx.is_inexact_array)."
        ) from error
    for shape, remembered in shapes:
        if shape != remembered:
            raise ValueError(
                f"These are not the parameters that the optimizer state was made for: one has the "
                f"shape {shape}, and in the state {remembered}."
            )
    return found


def _norm(momentum: PyTree) -> jax.Array:
    # Under `optax.tree.map_params` there is nothing to be summed.
    return numerics.norm([m for m in jax.tree.leaves(momentum) if isinstance(m, jax.Array)])


def _change(params: PyTree, moved: PyTree) -> jax.Array:
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True)
    changed = [(w, v) for w, v in pairs if v is not w]
    return jnp.asarray(numerics.distance(*zip(*changed, strict=True)), jnp.float32)


def _at(rho: optax.ScalarOrSchedule, step: jax.Array) -> jax.Array:
    return jnp.asarray(strength.at("rho", rho, step), jnp.result_type(float))


def _is_absent(momentum: Any) -> bool:
    return isinstance(momentum, optax.MaskedNode)
