from __future__ import annotations

import ipywidgets
import pytest
from haste_core.study.explore import BATCH, drawn_from, explore

from haste_core.errors import HasteError


def drawn(**chosen):
    return chosen


def test_in_batch_the_picture_stands_at_its_start_values(monkeypatch):
    monkeypatch.setenv(BATCH, "1")
    assert explore(drawn, {"t": 0.5}, t=[0.1, 0.5], arm=["repa", "haste"]) == {"t": 0.5, "arm": "repa"}


def test_by_hand_there_is_a_control_for_each_choice(monkeypatch):
    monkeypatch.delenv(BATCH, raising=False)
    made = explore(drawn, {"t": 0.5}, t=[0.1, 0.5], arm=["repa", "haste"])
    slider, menu = made.children[0].children
    assert isinstance(slider, ipywidgets.SelectionSlider)
    assert isinstance(menu, ipywidgets.Dropdown)
    assert (slider.value, menu.value) == (0.5, "repa")


def test_moving_a_control_draws_anew(monkeypatch):
    monkeypatch.delenv(BATCH, raising=False)
    seen = []
    made = explore(lambda **chosen: seen.append(chosen), t=[0.1, 0.5])
    made.children[0].children[0].value = 0.5
    assert seen == [{"t": 0.1}, {"t": 0.5}]


def test_an_impossible_start_value_names_the_possible_ones():
    with pytest.raises(HasteError, match=r"start value of t '0.3'.*possible: 0.1, 0.5"):
        explore(drawn, {"t": 0.3}, t=[0.1, 0.5])


def test_rows_measured_on_demand_are_drawn():
    draw = drawn_from(lambda t, arm: [t, arm], lambda rows: ("picture", rows))
    assert draw(t=0.5, arm="repa") == ("picture", [0.5, "repa"])
