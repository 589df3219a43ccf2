import pytest
from hypothesis import given
from hypothesis import strategies as st

from wealy_ray.audio import WINDOW_SAMPLES, Window, plan_windows

S = 16_000  # samples per second


@given(num_samples=st.integers(1, 400 * S), hop_s=st.floats(0.5, 30.0))
def test_windows_cover_every_sample_and_hold_no_pure_padding(num_samples, hop_s):
    windows = plan_windows(num_samples, hop_s)
    covered_to = 0
    for i, (start, end) in enumerate(windows):
        assert start == i * round(hop_s * S)
        assert start < end <= num_samples
        assert end - start <= WINDOW_SAMPLES
        assert start <= covered_to  # no hole
        assert end > covered_to  # nothing lies wholly inside the window before
        covered_to = end
    assert covered_to == num_samples
    assert all(end - start == WINDOW_SAMPLES for start, end in windows[:-1])


@pytest.mark.parametrize(
    ("duration_s", "hop_s", "expected_s"),
    [
        (1, 25.0, [(0, 1)]),
        (30, 25.0, [(0, 30)]),
        (31, 25.0, [(0, 30), (25, 31)]),
        (55, 25.0, [(0, 30), (25, 55)]),
        (56, 25.0, [(0, 30), (25, 55), (50, 56)]),
        (60, 30.0, [(0, 30), (30, 60)]),
        (61, 30.0, [(0, 30), (30, 60), (60, 61)]),
    ],
)
def test_examples(duration_s, hop_s, expected_s):
    assert plan_windows(duration_s * S, hop_s) == [Window(start * S, end * S) for start, end in expected_s]


def test_five_minutes_at_25_s_are_twelve_windows():
    assert len(plan_windows(300 * S)) == 12


def test_an_empty_track_has_no_window():
    assert plan_windows(0) == []


@pytest.mark.parametrize("hop_s", [0.0, -1.0, 30.01, 1e-6, float("nan"), float("inf")])
def test_a_bad_hop_is_refused(hop_s):
    with pytest.raises(ValueError, match="hop_s must be above 0 and at most 30 s"):
        plan_windows(S, hop_s)
