"""The tables of benchmarks that compile for TPUs, or run beside torchax, and what they read from
schedules, without either."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
FACTS = {"gigabytes": 0.5, "flops": 1e9, "temporaries": 60.0, "xla_cycles": 2e6, "seconds": 3.2}
FACTS |= {"sort": 0, "gather": 1, "scatter": 2000, "kernels": 2}
SCHEDULE = """
  0x10   :  { %a = b }
  0x11 LB: > { one }
  0x12 PB: > { two }
  0x13 LB: >> { three }
  0x14   :  {}
  0x15   : >> { four }
  0x16 LB: >> { five }
  0x17   : > { six }
  0x18   :  { seven }
"""


@pytest.mark.parametrize(("depth", "sizes"), [(1, [7]), (2, [3, 1])])
def test_bundles_of_loops_are_read_from_a_schedule(depth, sizes, script, tmp_path):
    (tmp_path / "17-jvp_lsg_forward_.1-01-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "17-jvp_lsg_forward_.1-00-schedule-analysis_final_bundles.txt").write_text("LB")
    read = script("tpu_programs").loop_bundles
    assert read(tmp_path, "lsg_forward", depth) == [sizes]
    assert read(tmp_path, "lsg_backward", depth) == []


def test_splash_attention_is_given_the_pattern(script):
    """The own block, its neighbours, two blocks of representatives on each side, and a global."""
    report = script("tpu_report")
    mask, count = report.lsg_tiles(1024), 1024 + 512 + 1
    assert mask.shape == (1024, 2048)
    seen = mask[:, :]
    assert not seen[:, count:].any() and seen[:, count - 1].all()
    block = np.arange(1024) // 128
    assert (seen[:, :1024] == (np.abs(block[:, None] - block) <= 1)).all()
    first, fifth = (np.flatnonzero(seen[n * 128, 1024 : count - 1]) // 64 for n in (0, 4))
    assert set(first) == {2, 3} and set(fifth) == {1, 2, 6, 7}
    assert (mask[512:, :512] == seen[512:, :512]).all()
    assert report.visited(1024) == sum(
        seen[i : i + 512, j : j + 512].any() for i in (0, 512) for j in range(0, 2048, 512)
    )


def test_rows_of_the_report_are_kept_replaced_and_printed(script, tmp_path, monkeypatch, capsys):
    report = script("tpu_report")
    measured = []

    def measure(chip, what, passes, tokens, torchax_python):
        measured.append((chip, what, passes, tokens))
        case = {"chip": chip, "what": what, "passes": passes, "tokens": tokens}
        return case | FACTS | {"forward": 1_200_000} | {"seconds": float(len(measured))}

    monkeypatch.setattr(report, "measure", measure)
    common = ["--output", str(tmp_path), "--chips", "v5e"]
    report.main([*common, "--what", "pallas", "step0", "--passes", "both"])
    lengths = [tokens for _, what, _, tokens in measured if what == "pallas"]
    assert lengths == [4096, 1024, 2048, 8192, 16384]
    report.main([*common, "--what", "pallas", "--passes", "both", "--lengths", "4096"])
    kept = json.loads((tmp_path / "tpu_report.json").read_text())
    assert [row["tokens"] for row in kept] == [1024, 2048, 4096, 4096, 8192, 16384]
    assert [row["seconds"] for row in kept if row["tokens"] == 4096] == [7, 2]
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].split(" | ")[1:] == (
        [
            "fused kernels, forward and backward",
            "0.500",
            "60",
            "2.0",
            "1.20",
            "0, 1, 2,000",
            "7 s |",
        ]
    )
    assert last[1].startswith("| v5e | training step, no dropout of attention | 0.500 | 60 |")
    assert (tmp_path / "tpu_report.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        report.main([*common, "--what", "cudnn"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make tpu")
def test_a_real_tpu_compilation_makes_a_row_of_the_report(script, tmp_path, capsys):
    """Attention as a layer calls it, within the limits of memory traffic and cycles."""
    options = ["--chips", "v5e", "--what", "layer", "--passes", "both", "--lengths", "4096"]
    script("tpu_report").main([*options, "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "tpu_report.json").read_text())
    assert 0 < row["gigabytes"] <= 0.3 and row["sort"] == row["gather"] == row["scatter"] == 0
    assert 0 < row["forward"] <= 1.2e6 and row["forward"] < row["backward"] < 2.2e6
    assert "| v5e | fused kernels within a layer, forward and backward |" in capsys.readouterr().out


def test_rivals_are_compared_before_they_are_timed(script, monkeypatch, capsys):
    """lsg_flax in torchax's place."""
    vs_torchax = script("vs_torchax")
    own, slips = vs_torchax.flax_side, []

    def other(folder, dtype):
        (weights, apply), named = own(folder, dtype)
        tensors = named(weights)

        def run(given, ids, mask):
            return apply(weights, ids, mask) + sum(slips) + 0 * sum(x.sum() for x in given.values())

        return tensors, run

    monkeypatch.setattr(vs_torchax, "torchax_side", other)
    sizes = ["--lengths", "64", "--layers", "1", "--width", "64", "--repeats", "1"]
    vs_torchax.main([*sizes, "--modes", "forward"])
    head, _, row = capsys.readouterr().out.splitlines()
    cells = row.split(" | ")
    assert cells[:2] == ["| 64", "forward"] and len(cells) == len(head.split(" | "))
    assert cells[4].endswith(" x") and float(cells[8].removesuffix(" |")) < 1e-6
    slips.append(0.01)
    with pytest.raises(AssertionError, match="the rivals differ by"):
        vs_torchax.main([*sizes, "--modes", "forward"])
    with pytest.raises(AssertionError, match="only one rival has"):
        vs_torchax.difference({"a": np.ones(1)}, {"b": np.ones(1)})
    assert vs_torchax.difference({"a": np.full(2, 4.0)}, {"a": np.full(2, 4.0002)}) < 1e-4
