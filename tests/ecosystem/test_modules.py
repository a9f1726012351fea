"""A module where its parameters belong is an error that names what to write, everywhere."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import gnp_optax as gnp
import gnp_optax.equinox as gnp_equinox
import gnp_optax.nnx as gnp_nnx
from gnp_optax import diagnostics

KEY = jax.random.key(0)
X = jnp.ones((4, 2))
MODULES = {
    "NNX": nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    "linen": nn.Dense(2),
    "Equinox": eqx.nn.MLP(2, 2, 4, 1, key=KEY),
}
ADVICE = {
    "NNX": r"gnp_optax\.nnx\.value_and_grad\(loss_fn, r, alpha\)\(model, x, y\).*gnp_optax\.nnx\.v",
    "linen": r"params = model\.init\(key, x\)\['params'\].*gnp_optax\.linen\.TrainState",
    "Equinox": r"gnp_optax\.equinox\.value_and_grad.*eqx\.filter.*gnp_optax\.equinox\.value_fn",
}


def loss(params, x=None):
    raise AssertionError("The loss must not be called.")


def opt_state(tx):
    params = {"w": jnp.ones(2)}
    return tx.update(params, tx.init(params), params, value_fn=lambda p: p["w"].sum())[1]


SAM, MOMENTUM = gnp.sam(0.1), gnp.momentum_sam(0.1)
GRADIENT = gnp.value_and_grad(loss, 0.1, 1.0)
FUNCTIONS = {
    "value_and_grad": lambda m: GRADIENT(m, X),
    "value_and_grad of a tree": lambda m: GRADIENT({"net": m, "scale": jnp.ones(1)}, X),
    "sam: init": SAM.init,
    "sam: update": lambda m: SAM.update(m, opt_state(SAM), m, value_fn=loss),
    "momentum_sam: init": MOMENTUM.init,
    "momentum_sam: update": lambda m: MOMENTUM.update(m, opt_state(optax.chain(MOMENTUM))[0], m),
    "perturbed": lambda m: gnp.perturbed(m, opt_state(optax.chain(MOMENTUM))),
    "accumulate": lambda m: gnp.batching.accumulate(loss, 2)(m, X),
    "m_sharpness": lambda m: gnp.batching.m_sharpness(GRADIENT, 2)(m, X),
    "masks.by_path": gnp.masks.by_path("w"),
    "masks.matrices": gnp.masks.matrices(),
    "masks.layers": ~gnp.masks.layers("w"),
    "masks.stacked": gnp.masks.stacked("w", last=1),
    "masks.top_k_layers": lambda m: gnp.masks.top_k_layers(m, 1),
    "masks.cost": lambda m: gnp.masks.cost(loss, m, None, X),
    "norms_by_layer": diagnostics.norms_by_layer,
    "layer_gradient_norms": lambda m: diagnostics.layer_gradient_norms(loss, m, X),
    "hessian_eigenvalues": lambda m: diagnostics.hessian_eigenvalues(loss, m, X),
    "hessian_trace": lambda m: diagnostics.hessian_trace(loss, m, X, key=KEY),
    "hessian_spectrum": lambda m: diagnostics.hessian_spectrum(loss, m, X, key=KEY),
    "sharpness": lambda m: diagnostics.sharpness(loss, m, X, rho=0.1),
    "worst_case_sharpness": lambda m: diagnostics.worst_case_sharpness(loss, m, X, rho=0.1),
    "m_sharpness of diagnostics": lambda m: diagnostics.m_sharpness(loss, m, X, rho=0.1, m=2),
    "random_direction": lambda m: diagnostics.random_direction(KEY, m),
    "loss_along": lambda m: diagnostics.loss_along(loss, m, X, direction=m, distances=X[:, 0]),
    "loss_surface": lambda m: diagnostics.loss_surface(
        loss, m, X, directions=(m, m), x=X[:, 0], y=X[:, 0]
    ),
    "loss_between": lambda m: diagnostics.loss_between(loss, m, m, X, positions=X[:, 0]),
}


@pytest.mark.parametrize("library", MODULES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_module_where_parameters_belong(name, library):
    with pytest.raises(TypeError, match=f"is a module of {library}.*{ADVICE[library]}"):
        FUNCTIONS[name](MODULES[library])


ADAPTERS = {
    "NNX": (
        lambda m: gnp_nnx.value_and_grad(loss, 0.1, 1.0)(m, X),
        lambda m: gnp_nnx.value_fn(loss, m, X),
        lambda m: gnp_nnx.perturbed(m, nnx.Optimizer(MODULES["NNX"], MOMENTUM, wrt=nnx.Param)),
    ),
    "Equinox": (
        lambda m: gnp_equinox.value_and_grad(loss, 0.1, 1.0)(m, X),
        lambda m: gnp_equinox.value_fn(loss, m, X),
        lambda m: gnp_equinox.perturbed(m, opt_state(optax.chain(MOMENTUM))),
    ),
}


@pytest.mark.parametrize("library", MODULES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_of_another_library(adapter, library):
    for function in ADAPTERS[adapter] if library != adapter else ():
        with pytest.raises(TypeError, match=f"is a module of {library}.*{ADVICE[library]}"):
            function(MODULES[library])


def test_arrays_of_an_equinox_model_are_parameters():
    model = MODULES["Equinox"]
    params = eqx.filter(model, eqx.is_inexact_array)

    def loss(params, x):
        return gnp_equinox.value_fn(lambda m, x: jax.vmap(m)(x).sum(), model, x)(params)

    _, grads = jax.jit(gnp.value_and_grad(loss, 0.1, 1.0))(params, X)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.leaves(gnp.masks.by_path("layers_0/weight")(params)) == [True, *3 * [False]]


@pytest.mark.parametrize(
    ("adapter", "params"),
    [
        ("nnx", nnx.state(MODULES["NNX"], nnx.Param)),
        ("equinox", eqx.filter(MODULES["Equinox"], eqx.is_inexact_array)),
    ],
)
def test_loss_of_the_model_where_one_of_its_parameters_belongs(adapter, params):
    with pytest.raises(TypeError, match="callable") as raised:
        SAM.update(params, SAM.init(params), params, value_fn=lambda m: jax.vmap(m)(X).sum())
    notes = "".join(raised.value.__notes__)
    assert f"value_fn=gnp_optax.{adapter}.value_fn(loss, model, x, y)" in notes
