"""Calls are timed in turn, in wall and process time, and a table shows what was measured."""

import statistics
import time

import pytest
import torch

from timm_memwrap.experiments.timing import Row, Seconds, compare_calls, compare_times, measure, table


def _work() -> None:
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass


def _sleep() -> None:
    time.sleep(0.03)


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    times = measure({"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}, 3)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert statistics.median(each.wall for each in times["b"]) >= 0.01


def test_what_sleeps_takes_wall_time_and_no_process_time() -> None:
    work, sleep = compare_calls({"work": _work, "sleep": _sleep}, "part", 3)
    assert (work.ratio, work.cpu_ratio) == (1, 1)
    assert work.cpu_milliseconds == pytest.approx(20, rel=0.5)
    assert sleep.milliseconds >= 30
    assert sleep.cpu_milliseconds is not None
    assert sleep.cpu_milliseconds < 5
    assert sleep.cpu_ratio is not None
    assert sleep.cpu_ratio < 0.25


def test_ratios_are_medians_of_those_within_a_round() -> None:
    # The machine is busy in the second round, for all alike.
    times = {
        "anchor": [Seconds(1, 1), Seconds(5, 1), Seconds(1, 1)],
        "twice": [Seconds(2, 3), Seconds(10, 3), Seconds(2, 3)],
    }
    _, row = compare_times(times, "part")
    assert (row.milliseconds, row.ratio, row.cpu_milliseconds, row.cpu_ratio) == (2000, 2, 3000, 3)


def test_a_device_is_waited_for_and_its_process_time_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(True))
    (found,) = measure({"call": lambda: None}, 1, "cuda")["call"]
    assert waited == [True, True]
    assert found.wall > 0
    assert found.process is None


@pytest.mark.parametrize(
    "seconds", [Seconds(0.002, None), Seconds(0.002, 0.0)], ids=["on a device", "below the resolution"]
)
def test_process_time_that_says_nothing_is_left_out(seconds: Seconds) -> None:
    rows = compare_times({"anchor": [seconds], "other": [seconds]}, "part", {"other": 1.5})
    assert all(row.cpu_ratio is None for row in rows)
    assert "1.5 met" in table(rows)


@pytest.mark.parametrize(
    ("ratio", "cpu_ratio", "met"), [(1.6, None, False), (1.4, None, True), (1.6, 1.4, True), (1.4, 1.6, False)]
)
def test_a_budget_is_judged_by_process_time_if_there_is_one(ratio: float, cpu_ratio: float | None, met: bool) -> None:
    row = Row("read", "exact read", 12.5, ratio, "matrix product", 1.5, cpu_ratio=cpu_ratio, bank_size=1_000_000)
    assert row.meets_budget is met
    assert ("1.5 met" if met else "1.5 MISSED") in table([row])
    assert "1,000,000" in table([row])


def test_a_table_says_what_else_was_measured() -> None:
    row = Row("sizes", "load", 1.0, 1.0, "raw", bank_size=10, width=512, classes=2, peak_ratio=1.25, extrapolated=True)
    text = table([row])
    for part in ("10 of 512, 2 classes", "peak 1.25 of what stays", "extrapolated"):
        assert part in text
    assert "MISSED" not in text
