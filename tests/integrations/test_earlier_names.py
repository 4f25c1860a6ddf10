"""Names that scripts may still have: each goes on working, and says once what it is called now."""

from __future__ import annotations

import importlib

import pytest

from loraplus.errors import LoraPlusWarning


@pytest.mark.parametrize(
    ("module", "earlier", "now"),
    [
        ("accelerate", "register_rates", "guard_resume"),
        ("accelerate", "log_rates", "rates_for_log"),
        ("optimizer_factory", "RatesCallback", "LoraPlusCallback"),
    ],
)
def test_an_earlier_name_says_once_what_it_is_called_now(module, earlier, now, monkeypatch):
    monkeypatch.setattr("loraplus.notices._told_of_names", set())
    place = importlib.import_module(f"loraplus.integrations.{module}")
    with pytest.warns(LoraPlusWarning, match=f"{earlier} is called {now}") as caught:
        assert callable(getattr(place, earlier)) and callable(getattr(place, earlier))
    assert [warning.filename for warning in caught] == [__file__]
    if earlier != "log_rates":
        assert getattr(place, earlier) is getattr(place, now)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = place.nothing
