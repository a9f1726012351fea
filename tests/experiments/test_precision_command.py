"""`python -m gnp_optax.experiments precision`: its table, and what is in it."""

import pytest

from gnp_optax.experiments import __main__
from gnp_optax.experiments.measure import precision


@pytest.mark.exhaustive
def test_the_table_of_the_command(tmp_path, capsys):
    args = ["--parameters", "200", "--radii", "0.05", "0.5", "--out", str(tmp_path)]
    precision.run(args)
    shown = capsys.readouterr().out
    assert shown.count("\n|") == 2 * len(precision.SETTINGS) + 1
    text = (tmp_path / "precision.md").read_text()
    assert text.startswith("`python -m gnp_optax.experiments precision --parameters 200")
    assert text.split("\n\n", 1)[1] in shown


@pytest.mark.exhaustive
def test_its_rows_are_what_they_say():
    rows = {(row["setting"], row["r"]): row for row in precision.measure(2048, [0.01, 0.5], 8)}
    single = rows["float32 parameters", 0.01]
    assert (single["moved"], round(single["perturbation"], 5)) == (1.0, 1.0)
    assert single["correction"] > 0.999
    half = rows["bfloat16 parameters", 0.01]
    assert 0 < half["moved"] < 0.9
    assert half["perturbation"] < 0.99
    wide = rows['bfloat16 parameters, `perturb_dtype="float32"`', 0.01]
    assert (wide["moved"], round(wide["perturbation"], 3)) == (1.0, 1.0)
    assert wide["correction"] > half["correction"]
    exact = rows['float32 parameters, bfloat16 compute, `curvature="exact"`', 0.01]
    assert exact["moved"] is None
    assert exact["correction"] > 0.99


@pytest.mark.parametrize("option", [["--radii", "0"], ["--parameters", "-1"]])
def test_an_impossible_option_is_named(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["precision", *option])
    printed = capsys.readouterr()  # by newer versions of tyro
    shown = f"{printed.out}{printed.err}{stopped.value}"
    assert f"{option[0]} must be positive" in shown
