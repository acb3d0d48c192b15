"""Figures hold the records' numbers, all of them, and nothing else."""

from __future__ import annotations

import pytest
from synthetic_pack import make_pack

from ipmerge_core.plots.spectra import SpectraInfo, spectra_figure, spectra_info

RECORD = make_pack(layers=1)["records"][1]


def test_spectra_info_holds_the_numbers_of_the_record():
    assert spectra_info(RECORD) == SpectraInfo(
        title="Layer 0, k",
        held=len(RECORD["index"]),
        possible=896,
        sigma_ranks=tuple(RECORD["index"]),
        angle_ranks=tuple(RECORD["index"]),
        mllm_sigma=tuple(RECORD["mllm_sigma"]),
        math_sigma=tuple(RECORD["math_sigma"]),
        angles=tuple(RECORD["angles"]),
        noise_floor=RECORD["noise_floor"],
        chance_first=RECORD["chance"]["first"],
        chance_max=RECORD["chance"]["max"],
        best_index=RECORD["best_index"],
        best_angle=RECORD["similarity"]["max"],
        principal=tuple((k, RECORD["principal"][str(k)]) for k in (1, 4, 16, 64)),
    )


def test_a_figure_of_a_pack_with_all_values_draws_all_and_says_how_many_there_are():
    full = make_pack(layers=1, hidden=64, feed=96, spectra=True)["records"][0]
    info = spectra_info(full)
    assert (info.held, info.possible, info.sigma_ranks) == (64, 64, tuple(range(1, 65)))
    for ranks, values in ((RECORD["index"], "41 of 896"), (info.sigma_ranks, "64 of 64")):
        figure = spectra_figure(info if values.startswith("64") else spectra_info(RECORD))
        assert f"{values} singular values" in figure.layout.annotations[0].text
        assert tuple(figure.data[0].x) == tuple(ranks)


def test_the_spectra_figure_draws_both_task_vectors_and_their_angles():
    info = spectra_info(RECORD)
    figure = spectra_figure(info)
    mllm, math, floor, angles, best, principal, chance = figure.data
    assert set(floor.y) == {info.noise_floor}
    assert set(chance.y) == {info.chance_max}
    assert tuple(mllm.y) == info.mllm_sigma
    assert tuple(math.y) == info.math_sigma
    assert tuple(angles.y) == info.angles
    assert (tuple(best.x), tuple(best.y)) == ((info.best_index,), (info.best_angle,))
    assert tuple(zip(principal.x, principal.y, strict=True)) == info.principal


def test_a_pinned_matrix_is_drawn_beside_the_chosen_one_in_thinner_lines_that_name_it():
    info, pinned = spectra_info(RECORD), spectra_info(make_pack(layers=2)["records"][-1])
    alone, both = spectra_figure(info), spectra_figure(info, pinned)
    added = both.data[len(alone.data) :]
    assert [tuple(line.y) for line in added] == [
        pinned.mllm_sigma,
        pinned.math_sigma,
        pinned.angles,
    ]
    assert all("Layer 1, down (pinned)" in line.name for line in added)
    assert max(line.line.width for line in added) < both.data[0].line.width


@pytest.mark.parametrize(("floor", "drawn"), [(0.01, True), (1e-9, False), (None, False)])
def test_the_noise_floor_is_drawn_where_it_lies_near_the_spectrum(floor, drawn):
    figure = spectra_figure(spectra_info({**RECORD, "noise_floor": floor}))
    assert ("rounding of the stored weights" in {trace.name for trace in figure.data}) == drawn


@pytest.mark.parametrize("narrow", [False, True])
def test_a_phone_gets_one_panel_below_the_other(narrow):
    layout = spectra_figure(spectra_info(RECORD), narrow=narrow).layout
    below = layout.yaxis2.domain[1] < layout.yaxis.domain[0]
    assert below == narrow


def test_no_figure_has_a_layout_title_because_the_app_would_give_it_an_empty_margin():
    assert "title" not in spectra_figure(spectra_info(RECORD)).to_plotly_json()["layout"]


def test_a_dark_page_gets_light_text():
    info = spectra_info(RECORD)
    light, dark = (spectra_figure(info, dark=dark).layout.font.color for dark in (False, True))
    assert light != dark
