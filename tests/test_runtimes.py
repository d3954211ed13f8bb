from nnunet_semiseg.deployment import runtimes


def test_the_median_of_what_is_counted(monkeypatch):
    """Calls take 1, 2, ... seconds; 3 of them are for warming up, and of the next ten, 4 to 13, the median is 8.5."""
    clock = {"now": 0.0, "calls": 0}

    def call():
        clock["calls"] += 1
        clock["now"] += clock["calls"]

    monkeypatch.setattr(runtimes, "perf_counter", lambda: clock["now"])
    assert runtimes.seconds(call) == 8.5 and clock["calls"] == 13
