"""What every rank of a test needs; imported once, in the process that the ranks are forked from."""

import peft  # noqa: F401
import torch
import torch.distributed.tensor
import transformers  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

import tests.tiny
import tests.toy  # noqa: F401
import xtuner_lite.runner.runner  # noqa: F401

torch.set_num_threads(1)
