"""Parameter groups by pattern, and optimizer state that travels by name."""

import pytest
from torch import nn

from xtuner_lite.engine.optim import OptimWrapper, build_param_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 1, bias=False)


def rates(groups):
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["param_names"]}


def test_one_group_without_rules():
    groups = build_param_groups(Net(), lr=1e-3, weight_decay=0.1)
    assert len(groups) == 1
    assert len(groups[0]["params"]) == 5


def test_rules_by_hand():
    groups = build_param_groups(
        Net(),
        lr=1.0,
        weight_decay=0.1,
        paramwise_cfg=dict(
            norm_decay_mult=0.0,
            bias_lr_mult=2.0,
            custom_keys={"head": dict(lr_mult=0.5), "proj.w*": dict(lr=3.0, weight_decay=0.0)},
        ),
    )
    assert rates(groups) == {
        "proj.weight": (3.0, 0.0),
        "proj.bias": (2.0, 0.1),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (2.0, 0.0),
        "head.weight": (0.5, 0.1),
    }


def test_the_longest_pattern_wins():
    rules = {"proj": dict(lr_mult=2.0), "proj.weight": dict(lr_mult=3.0)}
    found = rates(
        build_param_groups(Net(), lr=1.0, weight_decay=0.0, paramwise_cfg=dict(custom_keys=rules))
    )
    assert (found["proj.bias"][0], found["proj.weight"][0]) == (2.0, 3.0)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"custom_keys \['hed'\] match no trainable parameter; names look like"
    ):
        build_param_groups(
            Net(),
            lr=1.0,
            weight_decay=0.0,
            paramwise_cfg=dict(custom_keys={"hed": dict(lr_mult=1)}),
        )


def test_unknown_keys_are_refused():
    with pytest.raises(
        ValueError, match=r"paramwise_cfg has unknown keys \['norm_decay'\]; allowed: custom_keys"
    ):
        build_param_groups(Net(), lr=1.0, weight_decay=0.0, paramwise_cfg=dict(norm_decay=0))
    with pytest.raises(ValueError, match=r"custom_keys\['head'\] has unknown keys \['lr_mul'\]"):
        build_param_groups(
            Net(),
            lr=1.0,
            weight_decay=0.0,
            paramwise_cfg=dict(custom_keys={"head": dict(lr_mul=1)}),
        )


def test_nothing_trainable_is_refused():
    with pytest.raises(
        ValueError, match="no parameter of the model is trainable; give the model a `lora=...`"
    ):
        build_param_groups(Net().requires_grad_(False), lr=1.0, weight_decay=0.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(accumulative_counts=0), "accumulative_counts is 0"),
        (
            dict(clip_grad=dict(max_nrm=1)),
            r"optim_wrapper.clip_grad is {'max_nrm': 1}; it takes max_norm",
        ),
    ],
)
def test_wrong_sections_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OptimWrapper(dict(type="AdamW", lr=1.0), **kwargs)
