"""The whole-config check: what it tells, where, and that it is quiet about a right config."""

from __future__ import annotations

import copy
import functools

import pytest
from mmengine.config import Config

from tests.config.pages import line_of, write_page
from xtuner_lite.config import check_config, list_configs, load_config, report_problems
from xtuner_lite.config.origins import dotted, flatten


def problems_of(path):
    return check_config(load_config(path))


def only(problems):
    assert len(problems) == 1, report_problems(problems)
    return problems[0]


def test_right_config_has_no_problem(tmp_path):
    assert problems_of(write_page(tmp_path)) == []


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        ("max_length=max_length", "max_lenght=max_length", "train_dataloader.dataset.max_lenght",
         "ChatDataset has no option 'max_lenght'; did you mean 'max_length'"),
        ("r=8,", "rr=8,", "model.lora.rr", "LoraConfig has no option 'rr'"),
        ("lora=dict", "lara=dict", "model.lara", "did you mean 'lora'"),
        ("clip_grad=", "clip_gard=", "optim_wrapper.clip_gard", "did you mean 'clip_grad'"),
        ("max_norm=", "max_nrm=", "optim_wrapper.clip_grad.max_nrm", "did you mean 'max_norm'"),
        ("max_epochs=1", "max_epoch=1", "train_cfg.max_epoch", "did you mean 'max_epochs'"),
        ("batch_size=2", "batchsize=2", "train_dataloader.batchsize", "did you mean 'batch_size'"),
        ('type="EMAHook"', 'type="EMAHok"', "custom_hooks.0.type", "did you mean 'EMAHook'"),
        ("begin_iter=3", "begin_itre=3", "custom_hooks.0.begin_itre", "did you mean 'begin_iter'"),
        ("dict(max_epochs=1)", 'dict(max_epochs="1")', "train_cfg.max_epochs",
         "got '1' .str.; allowed: int or None"),
        ("lr = 2e-4", 'lr = "2e-4"', "optim_wrapper.optimizer.lr",
         "got '2e-4' .str.; allowed: float"),
        ("path=model_path),\n", "path=model_path, devce_map=None),\n", "model.llm.devce_map",
         "load_causal_lm has no option 'devce_map'; did you mean 'device_map'"),
        ("batch_size=2", "batch_size=True", "train_dataloader.batch_size", "allowed: int"),
        ("train_cfg = dict(max_epochs=1)", "resum = True", "resum", "did you mean 'resume'"),
        ("train_cfg = dict(max_epochs=1)", "compil = True", "compil", "did you mean 'compile'"),
    ],
)  # fmt: skip
def test_mistake_is_told_with_place_and_nearest_name(tmp_path, old, new, key, message):
    page = write_page(tmp_path, (old, new))
    problems = problems_of(page)
    problem = only(problems)
    assert problem.key == key
    pytest.raises(ValueError, _raise, problem).match(message)
    wanted = "lr = " if key.endswith(".lr") else new.split("\n")[0]
    assert problem.place == f"{page}:{line_of(page, wanted)}"


def _raise(problem):
    raise ValueError(str(problem))


def test_open_kwargs_accept_a_name_that_is_like_no_known_one(tmp_path):
    page = write_page(tmp_path, ("path=model_path),\n", "path=model_path, rope_scaling=None),\n"))
    assert problems_of(page) == []


def test_missing_required_keyword(tmp_path):
    page = write_page(tmp_path, ('        data="data/rows.json",\n', ""))
    problem = only(problems_of(page))
    assert problem.key == "train_dataloader.dataset"
    assert "ChatDataset needs 'data'" in problem.message


def test_arguments_of_the_runner_are_not_missing(tmp_path):
    page = write_page(
        tmp_path,
        ("train_cfg = ", 'param_scheduler = dict(type="CosineAnnealingLR", T_max=3)\ntrain_cfg = '),
    )
    assert problems_of(page) == []  # optimizer comes from the Runner


def test_all_problems_stand_in_one_report(tmp_path):
    page = write_page(
        tmp_path, ("r=8", "rnk=8"), ("lr=lr", "lrr=lr"), ("max_epochs=1", "max_epohs=1")
    )
    problems = problems_of(page)
    report = report_problems(problems)
    assert len(problems) == 3
    assert report.startswith("3 problems in the config:\n  1. ")
    assert all(word in report for word in ("'rnk'", "'lrr'", "'max_epohs'"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "from peft import LoraConfg",
            "cannot import 'LoraConfg' from peft; did you mean 'LoraConfig'",
        ),
        ("from xtuner_lite.engine.hokks import X", "xtuner_lite.engine has no 'hokks'; .*'hooks'"),
        ("from no_such_package import X", "there is no module 'no_such_package'; install"),
        ("import no_such_package", "there is no module 'no_such_package'; install"),
    ],
)
def test_import_of_a_missing_name_is_refused(tmp_path, line, message):
    page = write_page(tmp_path, ("from peft", f"{line}\nfrom peft"))
    problem = only(problems_of(page))
    assert problem.place == f"{page}:{line_of(page, line)}"
    pytest.raises(ValueError, _raise, problem).match(message)


def test_lazy_value_that_does_not_exist(tmp_path):
    page = write_page(
        tmp_path,
        ("from peft", "import torch\nfrom peft"),
        ("llm=dict(type=load_causal_lm,", "llm=dict(type=load_causal_lm, dtype=torch.bfloat61,"),
    )
    problem = only(problems_of(page))
    assert problem.key == "model.llm.dtype"
    assert "bfloat61" in problem.message


def test_lazy_value_that_exists(tmp_path):
    page = write_page(
        tmp_path,
        ("from peft", "import torch\nfrom peft"),
        ("llm=dict(type=load_causal_lm,", "llm=dict(type=load_causal_lm, dtype=torch.bfloat16,"),
    )
    assert problems_of(page) == []


def test_setting_that_only_a_base_has_read(tmp_path):
    (tmp_path / "base.py").write_text(
        "max_length = 16\nlr = 1\n"
        "data = dict(type='ChatDataset', data='x', max_length=max_length)\n"
        "train_dataloader = dict(dataset=data)\n"
        "model = dict(type='SupervisedFinetune', llm=dict(type='load', path='x'))\n"
    )
    leaf = tmp_path / "leaf.py"
    leaf.write_text(
        "from mmengine.config import read_base\n"
        "with read_base():\n    from .base import model, train_dataloader, max_length\n"
        "max_length = 4096\n"
    )
    problem = next(p for p in problems_of(leaf) if p.key == "max_length")
    assert problem.place == f"{leaf}:4"
    assert "has no effect" in problem.message
    assert "set train_dataloader.dataset.max_length instead" in problem.message
    assert load_config(leaf, ["max_length=4096"]).train_dataloader.dataset.max_length == 4096


def test_base_setting_that_only_the_leaf_reads_is_fine(tmp_path):
    (tmp_path / "base.py").write_text("root = 'data'\n")
    leaf = write_page(
        tmp_path,
        ("with read_base():\n", "with read_base():\n    from .base import *\n"),
        ('data="data/rows.json"', 'data=f"{root}/rows.json"'),
    )
    assert problems_of(leaf) == []


def test_function_and_set_in_a_config_are_refused(tmp_path):
    page = write_page(
        tmp_path,
        ("train_cfg", "def own(row):\n    return row\n\n\ntrain_cfg"),
        ('data="data/rows.json"', 'data="x", map_fn=lambda row: row'),
        ("begin_iter=3", "begin_iter=3, interval={1}"),
    )
    problems = {problem.key: problem.message for problem in problems_of(page)}
    assert "--plugin FILE" in problems["train_dataloader.dataset.map_fn"]
    assert f"{page}:" in problems["train_dataloader.dataset.map_fn"]
    assert "a set has no order" in problems["custom_hooks.0.interval"]


def test_default_hooks(tmp_path):
    page = write_page(
        tmp_path,
        ("train_cfg", "default_hooks.update(loger=dict(interval=1), timer=None)\ntrain_cfg"),
    )
    problem = only(problems_of(page))
    assert problem.key == "default_hooks.loger"
    assert "did you mean 'logger'" in problem.message
    page = write_page(
        tmp_path, ("train_cfg", "default_hooks.update(logger=dict(intervall=1))\ntrain_cfg")
    )
    assert "did you mean 'interval'" in only(problems_of(page)).message


def test_map_fn_name(tmp_path):
    page = write_page(tmp_path, ('data="data/rows.json"', 'data="x", map_fn="alpacca"'))
    assert "did you mean 'alpaca'" in only(problems_of(page)).message


def test_names_of_peft_and_functions_that_are_called_later(tmp_path):
    page = write_page(
        tmp_path,
        ("type=LoraConfig", 'type="LoraConfig"'),
        ('data="data/rows.json"', 'data="x", map_fn=dict(type="alpaca")'),
        ("batch_size=2", 'batch_size=2, collate_fn=dict(type="packed_collate")'),
    )
    assert problems_of(page) == []
    page = write_page(
        tmp_path,
        ("type=LoraConfig", 'type="LoraConfg"'),
        (
            "batch_size=2",
            'batch_size=2, collate_fn=dict(type="packed_collate", pad_to_multipleof=8)',
        ),
    )
    first, second = problems_of(page)
    assert "'LoraConfg': peft has no 'LoraConfg'; did you mean 'LoraConfig'" in first.message
    assert "packed_collate has no option 'pad_to_multipleof'; did you mean" in second.message


def test_dict_without_type_where_a_part_is_built(tmp_path):
    page = write_page(tmp_path, ("        type=ChatDataset,\n", ""))
    assert any("has no type" in problem.message for problem in problems_of(page))


def test_config_made_in_python():
    cfg = Config(dict(model=dict(type="SupervisedFinetune", llm=dict(type="nothing"), lara=None)))
    messages = [problem.message for problem in check_config(cfg)]
    assert any("no option 'lara'; did you mean 'lora'" in text for text in messages)


def misspell(word):
    """The word with its second and third letter swapped, else its last letter doubled."""
    if len(word) > 2 and word[1] != word[2]:
        return word[0] + word[2] + word[1] + word[3:]
    return word + word[-1]


def inside(held, part):
    """What lies at a key, no lazy object imported."""
    return dict.__getitem__(held, part) if isinstance(held, dict) else held[part]


def rename(root, path, name):
    """Rename the key at a path, keeping the order of keys."""
    held = functools.reduce(inside, path[:-1], root)
    items = [(name if key == path[-1] else key, value) for key, value in dict.items(held)]
    held.clear()
    for key, value in items:
        dict.__setitem__(held, key, value)


@pytest.mark.parametrize("in_each", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_misspelled_key_of_every_shipped_config_is_refused(in_each):
    """Each key at each depth, in three misspellings: told, with its right name. A key that many
    configs have at the same place, among the same keys of the same type, is tried in one of them,
    or in each."""
    count, missed, seen = 0, [], set()
    for info in list_configs():
        cfg = load_config(info.path)
        assert check_config(cfg) == [], report_problems(check_config(cfg))
        keys = [path for path, _ in flatten(cfg._cfg_dict) if path and isinstance(path[-1], str)]
        for path in keys:
            right = path[-1]
            holder = functools.reduce(inside, path[:-1], cfg._cfg_dict)
            kind = (sorted(holder), repr(dict.get(holder, "type"))) if path[1:] else ()
            if (place := repr((path, kind))) in seen and not in_each:
                continue
            seen.add(place)
            for wrong in {misspell(right), right + right[-1]} | (
                {right[:-1]} if right[2:] else set()
            ):
                changed = copy.deepcopy(cfg)
                rename(changed._cfg_dict, path, wrong)
                count += 1
                if not any(
                    problem.key == dotted((*path[:-1], wrong)) and repr(right) in problem.message
                    for problem in check_config(changed)
                ):
                    missed.append((info.name, dotted(path), wrong))
    assert count > (5000 if in_each else 300)
    assert missed == []
