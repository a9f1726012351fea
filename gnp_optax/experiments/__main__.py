"""`python -m gnp_optax.experiments [COMMAND]`: compare methods, or measure what they cost."""

import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__" and "-h" not in sys.argv and "--help" not in sys.argv:
    # The libraries below take seconds to import.
    print("Loading JAX, Flax and matplotlib ...", flush=True)

from gnp_optax.experiments import compare
from gnp_optax.experiments.measure import cost, curve, precision, sweep, throughput

COMMANDS = {
    "compare": compare.run,
    "cost": cost.run,
    "curve": curve.run,
    "precision": precision.run,
    "sweep": sweep.run,
    "throughput": throughput.run,
}


def main(args: Sequence[str]) -> None:
    """Run a command; without its name, the comparison."""
    is_named = bool(args) and not args[0].startswith("-")
    name, options = (args[0], args[1:]) if is_named else ("compare", args)
    try:
        if name not in COMMANDS:
            raise ValueError(f"there is no command {name!r}, but {', '.join(COMMANDS)}.")
        COMMANDS[name](options)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        kept = "What is done is kept: start the same command again to go on."
        said = kept if name == "compare" else "Nothing was written."
        print(f"Interrupted. {said}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1:])
