"""What rounding the weights of a transformer costs."""

import pytest

import mmdit
from mmdit.metrics.quantization import as_markdown, costs, main, random_network


def test_errors_are_those_of_the_bits(tmp_path):
    network = random_network(depth=2, width=128)
    rows = {row.kind: row for row in costs(network)}
    assert rows.keys() == {"BF16", "scaled_fp8", "fp8", "Q8_0", "Q5_1", "Q4_0"}
    bits = {"BF16": 16, "scaled_fp8": 8, "fp8": 8, "Q8_0": 8.5, "Q5_1": 6, "Q4_0": 4.5}
    weights = {"BF16": 0.0017, "Q8_0": 0.0055, "scaled_fp8": 0.026, "fp8": 0.026}
    weights |= {"Q5_1": 0.038, "Q4_0": 0.086}
    for kind, row in rows.items():
        assert row.bits == pytest.approx(bits[kind], rel=0.1)  # with the header of the file
        assert row.weights == pytest.approx(weights[kind], rel=0.2)
        assert 0.3 * row.weights < row.output < 10 * row.weights
    table = as_markdown(list(rows.values()))
    assert table.count("\n") == 7 and "| Q8_0 | 8." in table


def test_the_command_measures_a_file(tmp_path, capsys):
    path = mmdit.save_single_file(random_network(depth=2, width=64), tmp_path / "x.safetensors")
    main([str(path)])
    assert capsys.readouterr().out.count("| ") > 20
    for words, expected in (
        (["nowhere.safetensors"], "there is no such file"),
        (["--width", "100"], "width=100 must be a multiple of 64"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and expected in capsys.readouterr().err
