"""The methods whose cost is measured, and what others offer for the same purpose."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gnp_optax as gnp
from gnp_optax.experiments.measure.workload import Batch, Params, Workload

R, ALPHA = 0.1, 0.8

Gradient = Callable[[Params, Batch], tuple[Any, Params]]
# `call(function, *args)` runs a jitted function, or counts what that would cost.
Call = Callable[..., Any]
Step = Callable[[Call, Params, Batch], tuple[Any, Params]]
Scope = Literal["all", "masked"]


class Method(NamedTuple):
    """A way to a gradient.

    `step` returns `((loss, batch_stats), gradient)`, from one call of a jitted function or several.
    `counted` is the step whose FLOPs are counted in its place.
    """

    name: str
    step: Step
    counted: Step | None = None


PLAIN = "plain gradient"


def methods(workload: Workload) -> list[Method]:
    """Return all rows of the table, the plain gradient first."""
    plain = jax.value_and_grad(workload.loss, has_aux=True)
    last, head = workload.depth - 1, workload.depth
    part: Any = {"mask": workload.mask(last)}
    here = "last block + head"
    gr = functools.partial(_regularized, workload)
    traced = _traced(workload, _regularized)
    return [
        Method(PLAIN, one(plain)),
        Method("GR, all layers", one(gr())),
        Method("GR, all layers, traced alpha", _with(traced, ALPHA)),
        Method("SAM, all layers", one(gr(alpha=1.0))),
        Method(f"layer-wise GR, {here}", layerwise(workload, last, "all")),
        Method(
            f"layer-wise GR, {here}, traced alpha",
            _with(_traced(workload, _regularized, **part), ALPHA),
        ),
        Method(f"layer-wise GR, {here}, scope masked", layerwise(workload, last, "masked")),
        Method("layer-wise GR, head only", layerwise(workload, head, "all")),
        Method("layer-wise GR, head only, scope masked", layerwise(workload, head, "masked")),
        Method("exact curvature, all layers", one(gr(curvature="exact"))),
        Method(f"exact curvature, {here}", one(gr(**part, curvature="exact"))),
        Method("one gradient (momentum SAM), all layers", one(_remembered(workload, plain))),
        Method(f"early layers stale, {here} fresh", one(_hybrid(workload, part["mask"]))),
        Method("transformation, all layers", one(_transformed(workload))),
        Method(
            "transformation, all layers, traced alpha",
            _with(_traced(workload, _transformed), ALPHA),
        ),
        Method(f"transformation, {here}", one(_transformed(workload, **part))),
        Method(
            "zero-warmup, during warmup (traced alpha, now 0)",
            _with(traced, 0.0),
            counted=one(_with_untaken_branch_removed(traced)),
        ),
        Method("zero-warmup, during warmup (alpha 0 in Python)", one(gr(alpha=0.0))),
        Method("peer: optax.contrib.sam, opaque mode", one(_optax_sam(workload))),
        Method(f"peer: SAM, gradient times a 0/1 mask, {here}", one(_multiplied(workload, **part))),
        Method(f"peer: GR, two separate calls, {here}", _two_calls(workload, plain, **part)),
    ]


def one(gradient: Gradient) -> Step:
    """Return the step that is one call."""
    return lambda call, params, batch: call(gradient, params, batch)


@functools.cache
def layerwise(workload: Workload, block: int, scope: Scope) -> Step:
    """Return layer-wise GR from a block on; the same object for the same arguments."""
    return one(_regularized(workload, mask=workload.mask(block), scope=scope))


def _regularized(workload: Workload, *, alpha: Any = ALPHA, **options: Any) -> Gradient:
    def gradient(params: Params, batch: Batch) -> tuple[Any, Params]:
        core = gnp.value_and_grad(workload.loss, R, alpha, has_aux=True, **options)
        return core(params, batch)

    return gradient


def _traced(
    workload: Workload, form: Callable[..., Gradient], **options: Any
) -> Callable[..., Any]:
    def gradient(params: Params, batch: Batch, alpha: jax.Array) -> tuple[Any, Params]:
        return form(workload, alpha=alpha, **options)(params, batch)

    return gradient


def _with(gradient: Callable[..., Any], alpha: float) -> Step:
    return lambda call, params, batch: call(gradient, params, batch, jnp.float32(alpha))


def _with_untaken_branch_removed(traced: Callable[..., Any]) -> Gradient:
    # The same program, but XLA knows that alpha is 0 and removes the branch that is never taken.
    # Of a conditional it would count the dearest branch.
    return lambda params, batch: traced(params, batch, jnp.zeros([], jnp.float32))


def _hybrid(workload: Workload, late: Any) -> Gradient:
    return _remembered(workload, _regularized(workload, alpha=1.0, mask=late), mask=~late)


def _remembered(workload: Workload, gradient: Gradient, mask: Any = None) -> Gradient:
    """Return the gradient at what `gnp.momentum_sam` perturbs; its next state comes as aux."""
    tx = gnp.momentum_sam(R, mask=mask)

    def perturbed_gradient(params: Params, batch: Batch) -> tuple[Any, Params]:
        start: Any = tx.init(params)
        structure: Any
        leaves, structure = jax.tree.flatten(params)
        absent = structure.flatten_up_to(start.momentum)
        # Some that is no constant: the parameters.
        memory = [w if jax.tree.leaves(m) else m for w, m in zip(leaves, absent, strict=True)]
        momentum = jax.tree.unflatten(structure, memory)
        state = start._replace(momentum=momentum, momentum_norm=optax.tree.norm(momentum))
        (loss, aux), grads = gradient(gnp.perturbed(params, state), batch)
        updates, state = tx.update(grads, state, params)
        return (loss, (aux, state)), updates

    return perturbed_gradient


def _transformed(workload: Workload, *, alpha: Any = ALPHA, **options: Any) -> Gradient:
    tx = gnp.gradient_regularization(R, alpha, has_aux=True, **options)

    def gradient(params: Params, batch: Batch) -> tuple[Any, Params]:
        value, grads = jax.value_and_grad(workload.loss, has_aux=True)(params, batch)
        loss = functools.partial(workload.loss, batch=batch)
        updates, _ = tx.update(grads, tx.init(params), params, value_fn=loss)
        return value, updates

    return gradient


def _optax_sam(workload: Workload) -> Gradient:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(R))
    sam = optax.contrib.sam(optax.identity(), ascent, opaque_mode=True)

    def gradient(params: Params, batch: Batch) -> tuple[Any, Params]:
        value, grads = jax.value_and_grad(workload.loss, has_aux=True)(params, batch)
        at = jax.grad(lambda params, _: workload.loss(params, batch)[0])
        updates, _ = sam.update(grads, sam.init(params), params, grad_fn=at)
        return value, updates

    return gradient


def _moved(params: Params, grads: Params) -> Params:
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda w, g: w + R * g / norm, params, grads)


def _multiplied(workload: Workload, mask: Any) -> Gradient:
    def gradient(params: Params, batch: Batch) -> tuple[Any, Params]:
        value, grads = jax.value_and_grad(workload.loss, has_aux=True)(params, batch)
        kept = jax.tree.map(lambda g, m: g * jnp.float32(m), grads, mask(params))
        moved = _moved(params, kept)
        return value, jax.grad(workload.loss, has_aux=True)(moved, batch)[0]

    return gradient


def _two_calls(workload: Workload, plain: Gradient, mask: Any) -> Step:
    def move(params: Params, grads: Params) -> Params:
        kept = jax.tree.map(lambda g, m: g if m else jnp.zeros_like(g), grads, mask(params))
        return _moved(params, kept)

    def mix(grads: Params, perturbed: Params) -> Params:
        return jax.tree.map(lambda g, h: (1 - ALPHA) * g + ALPHA * h, grads, perturbed)

    def step(call: Call, params: Params, batch: Batch) -> tuple[Any, Params]:
        value, grads = call(plain, params, batch)
        _, perturbed = call(plain, call(move, params, grads), batch)
        return value, call(mix, grads, perturbed)

    return step
