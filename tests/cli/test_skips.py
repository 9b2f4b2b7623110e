"""Which tests may be skipped if everything that they need is installed."""

import pytest
from conftest import pytest_runtest_makereport


@pytest.mark.parametrize(
    ("wanted", "reason", "outcome"),
    [
        ("1", "Skipped: there is no Chromium here (apt-get install chromium)", "failed"),
        ("1", "Skipped: pip install playwright", "failed"),
        ("1", "Skipped: no pictures of the graphs: graphviz's program 'dot' is not installed", "failed"),
        ("1", "Skipped: there is no /dev/full", "skipped"),
        ("", "Skipped: pip install playwright", "skipped"),
    ],
)
def test_skips_for_want_of_what_ci_installs_are_failures_there(
    monkeypatch: pytest.MonkeyPatch, wanted: str, reason: str, outcome: str
) -> None:
    monkeypatch.setenv("MTL_TEST_ALL", wanted)
    skipped = pytest.TestReport("x", ("x", 1, "x"), {}, "skipped", ("x.py", 1, reason), "setup")
    hook = pytest_runtest_makereport()
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send(skipped)
    assert ended.value.value.outcome == outcome
    assert reason in str(ended.value.value.longrepr)
