# SPDX-License-Identifier: Apache-2.0
"""The contract's rules: parsing, exclusion, precedence, caps, the canonical form."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtprune import engine_kwargs, request_kwargs
from vllm_vtprune.contract import HEADERS, PRESETS
from vllm_vtprune.errors import PolicyError, SettingsError
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.selection.registry import METHODS
from vllm_vtprune.settings import Controls, KVSettings, PruneSettings, VisionSettings

POLICY = PrunePolicy(prune_layer=2)
UNIT = st.floats(0, 1)
SHARE = st.floats(0, 1, exclude_min=True)


def by_header(policy: PrunePolicy = POLICY, **fields: Any) -> PruneSettings:
    return policy.resolve(Controls.from_headers([(HEADERS[k], str(v)) for k, v in fields.items()]))


def by_body(policy: PrunePolicy = POLICY, **fields: Any) -> PruneSettings:
    return policy.resolve(Controls.from_mapping(fields))


@given(aggressiveness=UNIT, kv_keep=SHARE, method=st.sampled_from(sorted(METHODS)))
def test_headers_and_body_mean_the_same(aggressiveness: float, kv_keep: float, method: str) -> None:
    fields = {"aggressiveness": aggressiveness, "kv_keep": kv_keep, "method": method, "kv_scope": "vision"}
    settings = by_header(**fields)
    assert settings == by_body(**fields)
    assert settings.vision.aggressiveness == aggressiveness
    assert settings.kv == KVSettings(kv_keep, "vision")
    assert settings.vision.method == method


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_set_of_settings(name: str) -> None:
    settings = by_header(preset=name.upper())
    assert settings.preset == name
    assert settings.vision.aggressiveness == PRESETS[name].aggressiveness
    assert settings.kv.keep == PRESETS[name].kv_keep
    # the preset's kv_keep applies only where there is a prune layer
    assert by_header(PrunePolicy(), preset=name).kv.keep == 1.0


@pytest.mark.parametrize("share", [0.0, 1.01, math.nan])
def test_a_ceiling_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="max_share must be above 0 and at most 1"):
        VisionSettings(max_share=share)


def test_a_presets_ceiling_holds_until_a_request_says_how_much_is_to_stay() -> None:
    for name, preset in PRESETS.items():
        assert by_header(preset=name).vision.max_share == preset.max_share
        assert by_header(preset=name, method="topk", kv_keep=0.5).vision.max_share == preset.max_share
        for asked in ({"aggressiveness": 0.1}, {"keep_ratio": 0.9}):
            assert by_header(preset=name, **asked).vision.max_share == 1
    bounded, free = by_header(preset="light").vision, by_header(aggressiveness=0.23).vision
    assert bounded.canonical() != free.canonical(), "the two keep different tokens and share no cache entry"
    assert VisionSettings.from_canonical(bounded.canonical()) == bounded


def test_presets_grow_more_aggressive() -> None:
    order = [PRESETS[name] for name in ("off", "light", "balanced", "aggressive")]
    assert [p.aggressiveness for p in order] == sorted({p.aggressiveness for p in order})
    assert [p.kv_keep for p in order] == sorted([p.kv_keep for p in order], reverse=True)
    assert [p.max_share for p in order] == sorted({p.max_share for p in order}, reverse=True)
    assert by_header(preset="off").vision.keeps_all and not by_header(preset="off").kv.drops


def test_aggressiveness_replaces_the_presets_and_keep_ratio_the_inflection_point() -> None:
    assert by_header(preset="balanced", aggressiveness=0.9).vision.aggressiveness == 0.9
    fixed = by_header(preset="balanced", keep_ratio=0.25).vision
    assert (fixed.keep_ratio, fixed.aggressiveness) == (0.25, None)


@pytest.mark.parametrize(
    "fields,name",
    [
        ({"keep_ratio": 0.22}, "custom"),
        ({"aggressiveness": 0.5}, "custom"),
        ({"kv_keep": 0.5}, "custom"),
        ({"preset": "balanced", "keep_ratio": 0.5}, "custom"),
        ({"preset": "balanced", "method": "random"}, "custom"),
        ({"preset": "balanced", "kv_scope": "vision"}, "custom"),
        ({"preset": "balanced", "aggressiveness": PRESETS["balanced"].aggressiveness}, "balanced"),
        ({"keep_ratio": 1, "method": "random", "kv_scope": "vision"}, "off"),
        ({"aggressiveness": 0}, "off"),
    ],
)
def test_settings_go_by_a_presets_name_only_where_they_are_the_presets(
    fields: dict[str, Any], name: str
) -> None:
    settings = by_body(**fields)
    assert settings.preset == name
    assert (name == "off") is (settings.vision.keeps_all and not settings.kv.drops)
    by_default = by_body(PrunePolicy(prune_layer=2, default_preset="balanced"), keep_ratio=1, kv_keep=1)
    assert by_default.preset == "custom"


def test_the_operator_may_choose_another_default_method() -> None:
    policy = PrunePolicy(default_method="scope")
    assert policy.resolve(Controls.from_mapping({"preset": "balanced"})).vision.method == "scope"
    assert policy.resolve(Controls.from_mapping({"preset": "balanced"})).preset == "balanced"
    named = policy.resolve(Controls.from_mapping({"preset": "balanced", "method": "inflection"}))
    assert (named.vision.method, named.preset) == ("inflection", "custom")
    with pytest.raises(ValueError, match="default_method 'scope' is not among the methods"):
        PrunePolicy(default_method="scope", methods=("topk",))
    with pytest.raises(ValueError, match="must be one of auto, inflection"):
        PrunePolicy(default_method="nothing")
    # flags and variables hand over every field, as it is
    assert PrunePolicy(**PrunePolicy().model_dump()) == PrunePolicy()


def test_a_header_wins_over_the_body_field_by_field() -> None:
    headers = Controls.from_headers([("x-vtprune-aggressiveness", "0.25")])
    body = Controls.from_mapping({"aggressiveness": 0.75, "kv_keep": 0.5})
    settings = POLICY.resolve(headers.over(body))
    assert settings.vision.aggressiveness == 0.25
    assert settings.kv.keep == 0.5


def test_nothing_said_is_the_operators_default() -> None:
    assert POLICY.resolve(Controls()).vision.keeps_all
    policy = PrunePolicy(default_preset="balanced", prune_layer=2)
    assert policy.resolve(Controls()) == by_header(preset="balanced")
    other = [(b"accept", b"*/*"), (b"x-request-id", b"1")]
    assert Controls.from_headers(other) == Controls()


BAD_NUMBERS = ["nan", "inf", "-inf", "1.5", "-0.1", "", "abc", "1_0", "0x1", "1e400", "\u0660.\u0665x", "0,5"]


@pytest.mark.parametrize("field", ["aggressiveness", "keep_ratio", "kv_keep"])
@pytest.mark.parametrize("text", BAD_NUMBERS)
def test_a_bad_header_value_is_refused_and_named(field: str, text: str) -> None:
    with pytest.raises(SettingsError, match=r"must be a number in [\[(]0, 1\]") as error:
        by_header(**{field: text})
    assert error.value.param == HEADERS[field]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.01, -1, 10**400, "0.5", True, ["0.5"], {"a": 1}])
@pytest.mark.parametrize("field", ["aggressiveness", "keep_ratio", "kv_keep"])
def test_a_bad_body_value_is_refused_and_named(field: str, value: Any) -> None:
    with pytest.raises(SettingsError) as error:
        by_body(**{field: value})
    assert error.value.param == f"vtprune.{field}"


def test_bounds() -> None:
    assert by_header(aggressiveness="0").vision.keeps_all
    assert by_header(aggressiveness="1").vision.aggressiveness == 1
    assert by_body(keep_ratio=1).vision.keeps_all
    assert str(by_body(aggressiveness=-0.0).vision.aggressiveness) == "0.0"
    with pytest.raises(SettingsError):
        by_header(keep_ratio="0")
    assert by_header(kv_keep="0").kv == KVSettings(0.0)


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ([("X-VTPrune-Agressiveness", "0.5")], "X-VTPrune-Agressiveness"),
        ([("X-VTPrune-Preset", "light"), ("x-vtprune-preset", "light")], "X-VTPrune-Preset"),
        ([("X-VTPrune-Preset", "strong")], "X-VTPrune-Preset"),
        ([("X-VTPrune-Method", "best")], "X-VTPrune-Method"),
        ([("X-VTPrune-KV-Scope", "text")], "X-VTPrune-KV-Scope"),
        ([("X-VTPrune-Keep-Ratio", "0.5"), ("X-VTPrune-Aggressiveness", "0.5")], "X-VTPrune-Keep-Ratio"),
        ([(b"X-VTPrune-\xff", b"\xff")], "X-VTPrune-\xff"),
    ],
)
def test_bad_headers(headers: list[tuple[Any, Any]], param: str) -> None:
    with pytest.raises(SettingsError) as error:
        POLICY.resolve(Controls.from_headers(headers))
    assert error.value.param == param


@pytest.mark.parametrize("body", [[], "balanced", 1, False])
def test_the_body_field_must_be_an_object(body: Any) -> None:
    with pytest.raises(SettingsError, match="must be an object") as error:
        Controls.from_mapping(body)
    assert error.value.param == "vtprune"


def test_an_unknown_body_field_is_refused() -> None:
    with pytest.raises(SettingsError, match="Unknown field") as error:
        Controls.from_mapping({"agressiveness": 0.5})
    assert error.value.param == "vtprune.agressiveness"


def test_long_values_do_not_come_back_whole() -> None:
    with pytest.raises(SettingsError) as error:
        Controls.from_headers([("X-VTPrune-Preset", "x" * 60_000)])
    assert len(str(error.value)) < 500


def test_a_share_for_each_prune_layer() -> None:
    policy = PrunePolicy(prune_layers="2:0.8,4:0.5,6:0")
    settings = by_header(policy, kv_keep="0.5, 0.25,0")
    assert settings.kv == KVSettings(0.5, "all", (0.25, 0.0)) == by_body(policy, kv_keep=[0.5, 0.25, 0]).kv
    assert settings.as_dict()["kv_keep"] == [0.5, 0.25, 0.0]
    assert KVSettings.from_extra_args(settings.kv.extra_args(), KVSettings()) == settings.kv
    assert settings.kv.drops and KVSettings.of((1.0, 0.5)).drops and not KVSettings.of((1.0, 1.0)).drops


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        ("0.5,0.4,0.3", "names 3 shares, and this server has 2 prune layers"),
        ("0.5,0.4,0.3,0.2,0.1", "must be 1 to 4 numbers, not 5"),
        ("0.5,,0.2", "must be a number"),
        ("0.5,1.5", "must be a number"),
        ("0.5,0.1", "asks for kv_keep 0.1; this server keeps at least 0.2"),
    ],
)
def test_shares_that_cannot_be_served_are_refused(keep: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as error:
        by_header(PrunePolicy(prune_layers="2,4", min_kv_keep=0.2), kv_keep=keep)
    assert error.value.param == "X-VTPrune-KV-Keep"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prune_layers": "8:x"}, "prune_layers: '8:x' is no prune layer"),
        ({"prune_layers": 8}, "prune_layers must be text"),
        ({"prune_layers": "8,16", "relevance": "attention,unknown"}, "relevance must be one of attention"),
        ({"prune_layers": "8,16", "relevance": "inherited"}, "of which the first cannot inherit"),
        ({"prune_layers": "8", "prune_schedule": "a.json"}, "exclude each other: leave one out"),
        ({"preset_aggressiveness": "light"}, "such as balanced=0.55, not 'light'"),
        ({"preset_aggressiveness": "light=0.3,off=0.1"}, "not 'off=0.1'"),
        ({"preset_aggressiveness": "light=1.3"}, "not 'light=1.3'"),
    ],
)
def test_prune_layers_that_cannot_work_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        PrunePolicy.from_config({"vtprune": fields})


def test_several_prune_layers_have_a_first() -> None:
    policy = PrunePolicy(prune_layer=3, prune_layers="8:0.5,16:0")
    assert (policy.prune_layer, policy.has_prune_layer) == (8, True)
    assert PrunePolicy.from_config({"vtprune": policy.to_config()}) == policy
    # what a name means is known with the model
    assert (PrunePolicy(prune_layers="aim").prune_layer, PrunePolicy(prune_layers="aim").has_prune_layer) == (
        None,
        True,
    )
    assert not PrunePolicy().has_prune_layer


def test_a_schedule_s_file_is_read_with_the_model() -> None:
    policy = PrunePolicy(prune_layer=3, prune_schedule="found.json")
    assert (policy.prune_layer, policy.has_prune_layer, policy.named_schedule) == (None, True, "found.json")
    assert PrunePolicy.from_config({"vtprune": policy.to_config()}) == policy


def test_presets_can_be_calibrated() -> None:
    policy = PrunePolicy(preset_aggressiveness="light=0.3, balanced=0.6")
    balanced = by_header(policy, preset="balanced").vision
    assert (balanced.aggressiveness, balanced.max_share) == (0.6, PRESETS["balanced"].max_share)
    assert by_header(policy, preset="aggressive") == by_header(PrunePolicy(), preset="aggressive")
    assert policy.presets["light"].aggressiveness == 0.3 and policy.presets["off"] == PRESETS["off"]
    with pytest.raises(PolicyError, match="beyond the caps"):
        PrunePolicy.from_config(
            {"vtprune": {**policy.to_config(), "default_preset": "balanced", "max_aggressiveness": 0.55}}
        )


def test_a_preset_s_kv_keep_is_the_first_turn_s() -> None:
    """A later turn has all but its question in the prefix cache, which a pruned prompt cannot use."""
    policy = PrunePolicy(prune_layer=2, default_preset="balanced")
    preset = Controls.from_headers([("X-VTPrune-Preset", "balanced")])
    for controls in (preset, Controls()):
        first, later = policy.resolve(controls), policy.resolve(controls, later_turn=True)
        assert (first.kv.keep, later.kv.keep) == (PRESETS["balanced"].kv_keep, 1.0)
        assert (first.vision, first.preset) == (later.vision, later.preset)
    asked = Controls.from_headers([("X-VTPrune-Preset", "balanced"), ("X-VTPrune-KV-Keep", "0.4")])
    assert policy.resolve(asked, later_turn=True).kv.keep == 0.4
    every = PrunePolicy(prune_layer=2, preset_kv_keep="every_turn")
    assert every.resolve(preset, later_turn=True) == every.resolve(preset) == policy.resolve(preset)
    with pytest.raises(PolicyError, match="must be one of first_turn, every_turn, not 'never'"):
        PrunePolicy.from_config({"vtprune": {"preset_kv_keep": "never"}})


def test_kv_keep_needs_a_prune_layer() -> None:
    without = PrunePolicy()
    with pytest.raises(SettingsError, match="prune layer") as error:
        by_header(without, kv_keep=0.5)
    assert error.value.param == "X-VTPrune-KV-Keep"
    assert not by_header(without, kv_keep=1).kv.drops


@pytest.mark.parametrize(
    ("policy", "field", "value", "cap"),
    [
        (PrunePolicy(max_aggressiveness=0.6), "aggressiveness", 0.7, "max_aggressiveness"),
        (PrunePolicy(max_aggressiveness=0.4), "preset", "balanced", "max_aggressiveness"),
        (PrunePolicy(min_keep_ratio=0.3), "keep_ratio", 0.2, "min_keep_ratio"),
        (PrunePolicy(min_kv_keep=0.5, prune_layer=1), "kv_keep", 0.4, "min_kv_keep"),
    ],
)
def test_beyond_a_cap_is_refused_and_the_cap_named(
    policy: PrunePolicy, field: str, value: Any, cap: str
) -> None:
    with pytest.raises(SettingsError, match=cap) as error:
        by_header(policy, **{field: value})
    assert error.value.param == HEADERS[field]


def test_a_preset_beyond_a_cap_may_be_named_where_the_rest_brings_it_within() -> None:
    policy = PrunePolicy(max_aggressiveness=0.4, min_kv_keep=0.6, prune_layer=1)
    settings = by_header(policy, preset="balanced", aggressiveness=0.3, kv_keep=0.7)
    assert (settings.preset, settings.vision.aggressiveness, settings.kv.keep) == ("custom", 0.3, 0.7)


def test_controls_can_be_switched_off() -> None:
    policy = PrunePolicy(client_controls=False, default_preset="balanced")
    assert policy.resolve(Controls()).preset == "balanced"
    with pytest.raises(SettingsError, match="operator") as error:
        by_header(policy, aggressiveness=0)
    assert error.value.param == "X-VTPrune-Aggressiveness"


@given(
    method=st.sampled_from(sorted(METHODS)),
    amount=st.one_of(st.tuples(UNIT, st.none()), st.tuples(st.none(), SHARE)),
    min_tokens=st.integers(1, 600),
)
def test_canonical_form_round_trips(
    method: str, amount: tuple[float | None, float | None], min_tokens: int
) -> None:
    settings = VisionSettings(method, *amount, min_tokens=min_tokens)
    again = VisionSettings.from_canonical(settings.canonical())
    assert again.canonical() == settings.canonical()
    if not settings.keeps_all:
        assert again == settings


def test_one_meaning_has_one_spelling() -> None:
    assert by_body(aggressiveness=1).vision.canonical() == by_header(aggressiveness="1.0").vision.canonical()
    spellings = {
        by_body(**f).vision.canonical()
        for f in ({}, {"aggressiveness": 0}, {"keep_ratio": 1, "method": "random"}, {"preset": "off"})
    }
    assert spellings == {"off"}
    # stage 2 does not enter: the same image with another kv_keep shares its embeddings
    assert by_body(aggressiveness=0.5, kv_keep=0.5).vision.canonical() == (
        by_body(aggressiveness=0.5).vision.canonical()
    )


@pytest.mark.parametrize("text", ["", "on", "{}", '{"method": "topk"}', "[1]", '{"aggressiveness":0.5}'])
def test_a_setting_that_is_not_canonical_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="request_kwargs"):
        VisionSettings.from_canonical(text)


def test_kv_settings_travel_in_extra_args() -> None:
    settings = KVSettings(0.5, "vision")
    assert KVSettings.from_extra_args(settings.extra_args(), KVSettings()) == settings
    assert KVSettings.from_extra_args(None, settings) == settings
    going_on = KVSettings(0.5, "vision", reuse=False, first_turn=7)
    assert going_on.extra_args()["vtprune"].items() >= {"kv_reuse": "off", "kv_first_turn": 7}.items()
    assert KVSettings.from_extra_args(going_on.extra_args(), KVSettings()) == going_on
    turns = [{"vtprune": {"kv_first_turn": bad}} for bad in (-1, 2.0, "7", True)]
    for bad in ({"vtprune": 1}, {"vtprune": {"kv_keep": 2}}, {"vtprune": {"x": 1}}, *turns):
        with pytest.raises(SettingsError):
            KVSettings.from_extra_args(bad, settings)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prune_layer": 0}, "prune_layer"),
        ({"prune_layer": True}, "prune_layer"),
        ({"window": 0}, "window"),
        ({"min_tokens": 0}, "min_tokens"),
        ({"default_preset": "x"}, "default_preset"),
        ({"max_aggressiveness": 1.5}, "max_aggressiveness"),
        ({"max_aggressiveness": "0.5"}, "max_aggressiveness"),
        ({"methods": ["nope"]}, "nope"),
        ({"methods": []}, "methods"),
        ({"default_method": "nope"}, "default_method"),
        ({"default_method": "topk", "methods": ["inflection"]}, "'topk' is not among the methods inflection"),
        ({"default_preset": "balanced", "max_aggressiveness": 0.1}, "default_preset"),
        ({"max_agressiveness": 0.1}, "max_agressiveness"),
        ({"kv_reuse": True}, "kv_reuse needs a prune layer"),
        (
            {"kv_reuse": True, "prune_layers": "3:vision=1", "prune_gate": "x"},
            "cannot be used with prune_gate",
        ),
    ],
)
def test_a_policy_that_cannot_work_is_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(PolicyError, match=word):
        PrunePolicy.from_config({"vtprune": fields})


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, "inflection"),
        ({"methods": ("topk", "uniform")}, "topk"),
        ({"default_method": "uniform"}, "uniform"),
        ({"methods": ("topk", "uniform"), "default_method": "uniform"}, "uniform"),
    ],
)
def test_a_request_that_names_no_method_gets_the_operators(fields: dict[str, Any], method: str) -> None:
    policy = PrunePolicy(**fields)
    assert by_body(policy, keep_ratio=0.5).vision.method == method
    assert by_body(policy, keep_ratio=0.5, method=policy.methods[0]).vision.method == policy.methods[0]


def test_policy_round_trips_through_additional_config() -> None:
    policy = PrunePolicy(prune_layer=3, methods=("inflection", "topk"), min_kv_keep=0.25)
    assert PrunePolicy.from_config({"vtprune": policy.to_config()}) == policy
    assert PrunePolicy.from_config({}) == PrunePolicy()
    assert PrunePolicy().to_config() == {}


def test_offline_helpers_speak_the_contracts_names() -> None:
    assert engine_kwargs(prune_layer=8) == {"additional_config": {"vtprune": {"prune_layer": 8}}}
    mm_kwargs, extra_args = request_kwargs(aggressiveness=0.5, kv_keep=0.5)
    assert mm_kwargs == {"vtprune": by_body(aggressiveness=0.5).vision.canonical()}
    assert extra_args == {"vtprune": {"kv_keep": 0.5, "kv_scope": "all"}}
    later = request_kwargs(kv_keep=0.5, first_turn=189)[1]
    assert KVSettings.from_extra_args(later, KVSettings()) == KVSettings(0.5, first_turn=189)
    with pytest.raises(SettingsError):
        request_kwargs(agressiveness=0.5)
    with pytest.raises(PolicyError):
        engine_kwargs(prune_layers=8)
