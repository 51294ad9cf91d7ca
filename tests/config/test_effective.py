"""Every effective setting and where it came from."""

from __future__ import annotations

from tests.config.pages import line_of, write_page
from xtuner_lite.config import effective_settings, format_settings, load_config


def settings_of(path, overrides=()):
    return {item.key: item for item in effective_settings(load_config(path, overrides))}


def test_origins(tmp_path):
    page = write_page(
        tmp_path,
        ("train_cfg = ", 'train_dataloader["dataset"].update(map_fn="alpaca")\ntrain_cfg = '),
    )
    found = settings_of(page, ["lr=1e-3", "model.lora.r=4", "custom_hooks.0.begin_iter=9"])

    def origin(key):
        return found[key].origin.rpartition("/")[2]

    # written in the page; the line of the key inside a call over several lines
    assert origin("train_dataloader.batch_size") == f"page.py:{line_of(page, 'batch_size=2')}"
    assert origin("model.lora.target_modules") == f"page.py:{line_of(page, 'target_modules')}"
    # set later by update()
    assert origin("train_dataloader.dataset.map_fn") == f"page.py:{line_of(page, '.update(map_fn')}"
    # through a setting: its own line, where the value would be changed
    line = line_of(page, "max_length = 128")
    assert origin("train_dataloader.dataset.max_length") == f"page.py:{line} (max_length)"
    # from a base
    assert origin("default_hooks.logger.interval").startswith("default_runtime.py:")
    # from the command line, directly and through a setting
    assert origin("model.lora.r") == "command line"
    assert origin("custom_hooks.0.begin_iter") == "command line"
    assert origin("optim_wrapper.optimizer.lr") == "command line (lr)"
    assert found["optim_wrapper.optimizer.lr"].value == 1e-3
    # defaults, ours and others'
    assert origin("model.activation_checkpointing") == "default of SupervisedFinetune"
    assert found["model.lora.lora_dropout"].value == 0.0
    assert origin("model.lora.lora_dropout") == "default of LoraConfig"
    assert origin("train_dataloader.num_workers") == "default of build_dataloader"
    assert origin("train_cfg.val_begin") == "default of TrainLoop"
    assert found["default_hooks.checkpoint.interval"].value == 500
    assert origin("default_hooks.timer") == "default hook"
    # what the Runner fills in is no setting
    assert "model.tokenizer" not in found
    assert "optim_wrapper.optimizer.params" not in found


def test_origin_of_a_dict_that_was_named_before_it_was_used(tmp_path):
    page = tmp_path / "p.py"
    page.write_text(
        "size = 3\n"
        "part = dict(\n    type='ChatDataset',\n    data='x',\n    limit=size,\n)\n"
        "train_dataloader = dict(dataset=part)\n"
    )
    found = settings_of(page)
    assert found["train_dataloader.dataset.data"].origin == f"{page}:4"
    assert found["train_dataloader.dataset.limit"].origin == f"{page}:1 (size)"


def test_list_items_and_appended_parts(tmp_path):
    page = tmp_path / "p.py"
    page.write_text(
        "custom_hooks = [\n    dict(type='EMAHook'),\n]\n"
        "custom_hooks.append(\n    dict(type='EmptyCacheHook', after_iter=True)\n)\n"
        "for hook in custom_hooks:\n    hook.update(priority='LOW')\n"
    )
    found = settings_of(page)
    assert found["custom_hooks.0.type"].origin == f"{page}:2"
    assert found["custom_hooks.1.after_iter"].origin == f"{page}:5"
    assert found["custom_hooks.1.priority"].origin == f"{page}:7"  # the loop that set it


def test_print_hides_secrets_and_has_a_line_each(tmp_path):
    page = write_page(tmp_path, ("path=model_path)\n", "path=model_path, token='abcdef')\n"))
    text = format_settings(effective_settings(load_config(page)))
    assert "abcdef" not in text
    assert any(line.split()[:2] == ["tokenizer.token", "'***'"] for line in text.splitlines())
    assert len(text.splitlines()) == len(effective_settings(load_config(page)))
