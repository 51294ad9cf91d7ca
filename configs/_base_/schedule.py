"""AdamW, clipped gradients, warm-up and cosine over the run. A leaf sets lr and lengths."""

from torch.optim import AdamW

from xtuner_lite.engine.schedulers import WarmupCosineLR

optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-4, betas=(0.9, 0.999), weight_decay=0.0),
    clip_grad=dict(max_norm=1.0),  # of the whole gradient, before each update
    accumulative_counts=1,  # micro-batches in one optimizer step
    dtype="auto",  # bf16 where the device computes it natively, else fp32; trained weights: fp32
)
param_scheduler = dict(type=WarmupCosineLR, warmup=0.03)  # share of the run
