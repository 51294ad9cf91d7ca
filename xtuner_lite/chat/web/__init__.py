"""A web page to talk to a model. Needs the ``web`` extra (gradio)."""
