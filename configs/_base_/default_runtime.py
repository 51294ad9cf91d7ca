"""What every run does unless its own config says otherwise."""

# Hooks by name, over the built-in ones (`xtuner-lite list hooks`). None drops one.
default_hooks = dict(
    logger=dict(interval=10),  # optimizer steps between two lines
    checkpoint=dict(interval=500, max_keep_ckpts=2),  # optimizer steps; the last step is saved too
)
custom_hooks = []

# Where curves go besides the local JSON lines and the PNG, which every run writes.
visualizer = None

randomness = dict(seed=0)  # sample order, dropout, new weights
launcher = "none"  # one process
load_from = None  # weights only: a checkpoint of ours, a Hugging Face model or adapter folder
resume = False  # True: go on from the newest valid checkpoint in work_dir
log_level = "INFO"
