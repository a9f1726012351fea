"""Print pip constraints that pin everything to the lower bounds of pyproject.toml."""

import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"].values()
requirements = [*project["dependencies"], *(r for extra in extras for r in extra)]
floors = dict(match.groups() for r in requirements if (match := re.match(r"([\w-]+)>=([\d.]+)", r)))
floors["jaxlib"] = floors["jax"]
sys.stdout.writelines(f"{name}=={version}\n" for name, version in floors.items())
