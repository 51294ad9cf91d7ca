"""SmolLM3-3B-Base goes on pre-training, all weights, on your own text."""

from mmengine.config import read_base

from xtuner_lite.data.dataset import TextDataset
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm, load_tokenizer

with read_base():
    from xtuner_lite.configs._base_.default_runtime import *
    from xtuner_lite.configs._base_.schedule import *

# 1 Settings
model_path = "HuggingFaceTB/SmolLM3-3B-Base"  # or a local folder
data_path = "data/text"  # a folder or file: rows of text (jsonl, parquet), or txt
max_length = 4096  # tokens of one packed sample
lr = 2e-5

# 2 Model
tokenizer = dict(type=load_tokenizer, path=model_path)
# Without lora=... every weight is trained.
llm = dict(type=load_causal_lm, path=model_path)
model = dict(type=SupervisedFinetune, llm=llm, activation_checkpointing=True)

# 3 Data
train_set = dict(type=TextDataset, data=data_path, max_length=max_length)
train_dataloader = dict(batch_size=1, dataset=train_set)  # packed samples per micro-batch

# 4 Schedule
optim_wrapper.update(accumulative_counts=32)  # micro-batches in one optimizer step
optim_wrapper["optimizer"].update(lr=lr, weight_decay=0.1)
train_cfg = dict(max_epochs=1)  # max_iters=... counts optimizer steps instead

# 5 Runtime
default_hooks.update(checkpoint=dict(interval=500, max_keep_ckpts=2))  # optimizer steps
