"""Programs on eight devices, which are forced on the host, in a process of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PRELUDE = """
import functools, re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import gnp_optax as gnp
from models.problems import mlp

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("data",))
params, loss, x, y = mlp()

def put_on(mesh, tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))

def put(tree, spec):
    return put_on(mesh, tree, spec)


def check(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)

# Traced, so that the second pass stands in a `cond`.
alpha = gnp.schedules.zero_warmup(0.8, 0)
tx = gnp.gradient_regularization(0.1, alpha)

def composed(params, x, y):
    grads = jax.grad(loss)(params, x, y)
    return tx.update(grads, tx.init(params), params, value_fn=lambda p: loss(p, x, y))

def core(params, x, y, step):
    return gnp.value_and_grad(loss, 0.1, alpha(step))(params, x, y)[1]
"""


def run_on_eight_devices(program):
    """Run a program after the prelude, and return what it printed."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    paths = [str(Path(__file__).parents[n]) for n in (0, 1, 2)]
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program)],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
