"""Flax linen: a `TrainState` that hands the loss to the optimizer."""

import dataclasses
import difflib
import functools
from typing import Any, Self

import optax
from flax.training import train_state

from gnp_optax import _momentum

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, whose `apply_gradients` passes extra arguments on to the optimizer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import gnp_optax as gnp
        >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2) / 2
        >>> state = TrainState.create(
        ...     apply_fn=None,
        ...     params={"w": jnp.array([3.0, 4.0])},
        ...     tx=optax.chain(gnp.sam(rho=0.5), optax.sgd(0.1)),
        ... )
        >>> grads = jax.grad(loss_fn)(state.params)
        >>> state = state.apply_gradients(grads=grads, value_fn=loss_fn)
        >>> [round(float(w), 4) for w in state.params["w"]]
        [2.67, 3.56]
    """

    @property
    def perturbed_params(self) -> Any:
        """The parameters at which a step of `gnp_optax.momentum_sam` takes its gradient.

        `gnp_optax.perturbed(self.params, self.opt_state)`:

            value, grads = jax.value_and_grad(loss_fn)(state.perturbed_params, x, y)
            state = state.apply_gradients(grads=grads)
        """
        if _OVERWRITTEN in self.params:  # scales of fp8, which the optimizer does not see
            moved = _momentum.perturbed(self.params["params"], self.opt_state)
            return {**self.params, "params": moved}
        return _momentum.perturbed(self.params, self.opt_state)

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """Update the parameters, the optimizer state and the step count.

        Args:
            grads: Gradient with respect to `self.params`.
            **kwargs: Those that name a field of the state (`batch_stats=...`) replace it. All
                others (`value_fn=...`, `value=...`) are extra arguments of the optimizer's
                `update`.

        Returns:
            The new state.

        Raises:
            TypeError: If an extra argument is given to an optimizer that takes none (`value_fn` may
                be given all the same, so that the baseline needs no other training step), or if
                it looks like a misspelt field.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        extra_args = {name: value for name, value in kwargs.items() if name not in fields}
        kinds = (optax.GradientTransformationExtraArgs, optax.MultiSteps)
        takes_extra_args = isinstance(self.tx, kinds)
        for name in extra_args.keys() - _OPTAX_NAMES:
            similar = difflib.get_close_matches(name, fields, n=1, cutoff=0.8)
            if similar or not takes_extra_args:
                hint = f" Did you mean {similar[0]!r}?" if similar else ""
                raise TypeError(
                    f"apply_gradients got {name!r}, which is neither a field of "
                    f"{type(self).__name__} nor anything that its optimizer takes.{hint}"
                )
        update = functools.partial(self.tx.update, **(extra_args if takes_extra_args else {}))
        # `tx` is a static field: were the closure left in it, every step would be compiled anew.
        bound = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        state: Self = super(TrainState, bound).apply_gradients(grads=grads, **replaced)
        return state.replace(tx=self.tx)


_OVERWRITTEN = "_overwrite_with_gradient"
# What Optax's own transformations are handed: never a misspelt field.
_OPTAX_NAMES = {"value", "value_fn", "grad", "grad_fn", "obj_fn"}


def __dir__() -> list[str]:
    return __all__
