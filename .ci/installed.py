"""Try what is installed in a folder: `PYTHONPATH=FOLDER python .ci/installed.py FOLDER`."""

import importlib.metadata
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import gnp_optax as gnp

package = Path(gnp.__file__).parent
assert package == Path(sys.argv[1], "gnp_optax"), package
assert (package / "py.typed").exists()

metadata = importlib.metadata.metadata("gnp-optax")
assert metadata["Version"] == gnp.__version__
python = "Programming Language :: Python :: {}.{}".format(*sys.version_info)
assert python in metadata.get_all("Classifier"), f"{python!r} is no classifier in pyproject.toml"
# Links, but those inside of code.
text = re.sub(r"```.*?```|`[^`]*`", "", metadata.get_payload(), flags=re.DOTALL)
links = re.findall(r"\]\((.*?)\)", text)
assert len(links) > 10, links
assert all(link.startswith("https://") for link in links), links

params = jnp.array([3.0, 4.0])
tx = optax.chain(gnp.sam(rho=0.5), optax.sgd(0.1))


def loss_fn(params):
    """Return half the squared norm."""
    return jnp.sum(params**2) / 2


updates, _ = tx.update(jax.grad(loss_fn)(params), tx.init(params), params, value_fn=loss_fn)
assert jnp.allclose(updates, jnp.array([-0.33, -0.44])), updates
