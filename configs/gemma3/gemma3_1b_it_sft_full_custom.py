"""Gemma-3-1B-it, all weights, on your own conversations."""

from mmengine.config import read_base

from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm, load_tokenizer

with read_base():
    from xtuner_lite.configs._base_.default_runtime import *
    from xtuner_lite.configs._base_.schedule import *

# 1 Settings
model_path = "google/gemma-3-1b-it"  # or a local folder
data_path = "data/my_chats.json"  # OpenAI messages, ShareGPT or Alpaca
max_length = 2048  # tokens of one packed sample
lr = 2e-5

# 2 Model
tokenizer = dict(type=load_tokenizer, path=model_path)  # with its own chat template
# Without lora=... every weight is trained.
llm = dict(type=load_causal_lm, path=model_path)
model = dict(type=SupervisedFinetune, llm=llm, activation_checkpointing=True)

# 3 Data
train_set = dict(type=ChatDataset, data=data_path, map_fn="auto", max_length=max_length)
train_dataloader = dict(batch_size=1, dataset=train_set)  # packed samples per micro-batch

# 4 Schedule
optim_wrapper.update(accumulative_counts=16)  # micro-batches in one optimizer step
optim_wrapper["optimizer"].update(lr=lr)
train_cfg = dict(max_epochs=3)  # max_iters=... counts optimizer steps instead

# 5 Runtime
default_hooks.update(checkpoint=dict(interval=500, max_keep_ckpts=2))  # optimizer steps
