"""Flax linen: a `TrainState` that hands the loss to the optimizer."""

import dataclasses
import functools
from typing import Any, Self

import optax
from flax.training import train_state


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
            TypeError: If an extra argument is given to an optimizer that takes none. `value_fn`
                may always be given, so that the optimizer can be exchanged for a plain one.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        extra_args = {name: value for name, value in kwargs.items() if name not in fields}
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        takes_extra_args = isinstance(self.tx, optax.GradientTransformationExtraArgs)
        unused = sorted(extra_args.keys() - {"value_fn"})
        if unused and not takes_extra_args:
            raise TypeError(
                f"apply_gradients got {unused}, which is neither a field of "
                f"{type(self).__name__} nor anything its optimizer takes."
            )
        tx = optax.with_extra_args_support(self.tx)
        bound = self.tx._replace(update=functools.partial(tx.update, **extra_args))
        # `tx` is a static field: were the closure left in it, every step would be compiled anew.
        plain = train_state.TrainState.apply_gradients
        state: Self = plain(self.replace(tx=bound), grads=grads, **replaced).replace(tx=self.tx)
        return state
