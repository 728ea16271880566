"""Configs are compared and hashed by what they build."""

from mmdit.recipes import Difference, config_hash, differences


def test_a_class_may_move_between_modules():
    before = {"path": {"_target_": "mmdit.flow.paths.Cosine", "x": [{"_target_": "a.B"}]}}
    now = {"path": {"_target_": "mmdit.flow.Cosine", "x": [{"_target_": "c.d.B"}]}}
    assert differences(before, now) == []
    assert config_hash(before) == config_hash(now)


def test_another_class_or_value_is_another_config():
    before = {"path": {"_target_": "mmdit.flow.Cosine"}, "steps": 4}
    assert differences(before, {"path": {"_target_": "mmdit.flow.Linear"}, "steps": 5}) == [
        Difference("path._target_", "Cosine", "Linear"),
        Difference("steps", 4, 5),
    ]
    assert config_hash(before) != config_hash({**before, "steps": 5})


def test_a_free_key_frees_all_below_it():
    before, now = {"a": {"b": {"c": 1}}, "ab": 1}, {"a": {"b": {"c": 2, "d": 3}}, "ab": 2}
    assert [str(each) for each in differences(before, now, ["a"])] == ["ab was 1, now 2"]
    assert [each.key for each in differences(before, now)] == ["a.b.c", "a.b.d", "ab"]
