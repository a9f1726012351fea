"""Write the API reference as pages, and stop at a warning: `python .ci/docs.py FOLDER`."""

import sys
import warnings
from pathlib import Path

import pdoc

import gnp_optax as gnp

warnings.simplefilter("error")
# Recursive types of chex and Flax, whose names can't be looked up from here.
warnings.filterwarnings("ignore", message=r".*Import of (ArrayTree|Filter) failed")

pdoc.render.configure(docformat="google")
pdoc.pdoc(
    "gnp_optax", *(f"gnp_optax.{name}" for name in gnp._EXTRAS), output_directory=Path(sys.argv[1])
)
