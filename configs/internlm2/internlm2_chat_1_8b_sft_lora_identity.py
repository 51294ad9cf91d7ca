"""InternLM2-Chat-1.8B learns its name, LoRA."""

from mmengine.config import read_base
from peft import LoraConfig

from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm, load_tokenizer

with read_base():
    from xtuner_lite.configs._base_.default_runtime import *
    from xtuner_lite.configs._base_.schedule import *

# 1 Settings
model_path = "internlm/internlm2-chat-1_8b"  # or a local folder
data_path = "data/identity.json"  # xtuner-lite make-identity --name ... --author ... FILE
max_length = 512  # tokens of one packed sample
lr = 2e-4

# 2 Model
tokenizer = dict(type=load_tokenizer, path=model_path)  # with its own chat template
lora = dict(type=LoraConfig, r=16, lora_alpha=32, target_modules="all-linear")
model = dict(type=SupervisedFinetune, llm=dict(type=load_causal_lm, path=model_path), lora=lora)

# 3 Data
train_set = dict(type=ChatDataset, data=data_path, map_fn="openai", max_length=max_length)
train_dataloader = dict(batch_size=1, dataset=train_set)  # packed samples per micro-batch

# 4 Schedule
optim_wrapper.update(accumulative_counts=4)  # micro-batches in one optimizer step
optim_wrapper["optimizer"].update(lr=lr)
param_scheduler.update(warmup=0.1)  # share of the run
train_cfg = dict(max_epochs=3)  # max_iters=... counts optimizer steps instead

# 5 Runtime
default_hooks.update(logger=dict(interval=4))  # optimizer steps
