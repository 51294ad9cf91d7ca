"""InternLM2-Chat-1.8B with CLIP-ViT-L-336: projector and QLoRA, on your questions."""

from mmengine.config import read_base
from peft import LoraConfig

from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.models.processors import load_llava_processor

with read_base():
    from xtuner_lite.configs._base_.default_runtime import *
    from xtuner_lite.configs._base_.schedule import *

# 1 Settings
model_path = "internlm/internlm2-chat-1_8b"
visual_encoder_path = "openai/clip-vit-large-patch14-336"
pretrained_pth = "stage_one"  # folder of a checkpoint of stage one
data_path = "data/my_questions.json"  # LLaVA rows: image, conversations
image_folder = "data/images"
max_length = 2048  # tokens of one packed sample, those of the images included
lr = 2e-4

# 2 Model
parts = dict(llm=model_path, visual_encoder=visual_encoder_path)
tokenizer = dict(type=load_llava_processor, **parts)  # 576 tokens an image
llm = dict(type=load_causal_lm, path=model_path, quantization="4bit")  # needs bitsandbytes
lora = dict(type=LoraConfig, r=64, lora_alpha=16, target_modules="all-linear")
tower = dict(type=load_visual_encoder, path=visual_encoder_path)
tower_lora = dict(type=LoraConfig, r=64, lora_alpha=16)
llava = dict(llm=llm, llm_lora=lora, visual_encoder=tower, visual_encoder_lora=tower_lora)
model = dict(type=LLaVAModel, **llava, pretrained_pth=pretrained_pth, activation_checkpointing=True)

# 3 Data
rows = dict(data=data_path, image_folder=image_folder, map_fn="llava")
train_set = dict(type=ChatDataset, **rows, max_length=max_length)
train_dataloader = dict(batch_size=4, num_workers=4, dataset=train_set)  # packed samples

# 4 Schedule
optim_wrapper["optimizer"].update(lr=lr)
train_cfg = dict(max_epochs=1)  # max_iters=... counts optimizer steps instead

# 5 Runtime
default_hooks.update(checkpoint=dict(interval=500, max_keep_ckpts=2))  # optimizer steps
