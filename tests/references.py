"""Tiny random transformers models of the real structure, and their outputs as numpy arrays."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "pad_token_id": 0,
}
MOE = {"moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2}
IMAGE, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END, VIDEO = 5, 6, 7, 8, 9, 11


def dense():
    """The 0.3B structure: head_dim times heads is not the hidden size, embedding tied."""
    return transformers.Ernie4_5ForCausalLM(transformers.Ernie4_5Config(**TEXT, tie_word_embeddings=True))


def moe():
    """The 300B and 21B structure: dense first layer, routed and shared experts, untied head."""
    config = transformers.Ernie4_5_MoeConfig(
        **TEXT,
        **MOE,
        moe_intermediate_size=24,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        moe_layer_interval=1,
        tie_word_embeddings=False,
    )
    return transformers.Ernie4_5_MoeForCausalLM(config)


def vl():
    """The VL structure: expert pools of different width, 3-D rotary positions, vision tower, resampler."""
    from transformers.models.ernie4_5_vl_moe import (
        Ernie4_5_VLMoeConfig,
        Ernie4_5_VLMoeForConditionalGeneration,
    )

    text = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"num_attention_heads": 3}
    text |= {"num_key_value_heads": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    text |= {"moe_intermediate_size": [24, 16], "tie_word_embeddings": True}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 6, 4]}
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 256}
    config = Ernie4_5_VLMoeConfig(
        text_config={**text, **MOE},
        vision_config=vision,
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
        video_token_id=VIDEO,
        tie_word_embeddings=True,
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config)


BUILDERS = {"dense": dense, "moe": moe, "vl": vl}


def build(kind, seed=0):
    """A reference model in which every part matters: norms off one, a correction bias off zero."""
    torch.manual_seed(seed)
    model = BUILDERS[kind]().float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                tensor.normal_(0, 0.05)
            elif "norm" in name or ".ln." in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif tensor.ndim > 1 and "inv_freq" not in name:
                tensor.mul_(3.0)  # the default 0.02 would leave attention and routing nearly uniform
    return model


def logits(model, ids, **inputs):
    """fp32 logits [S, V] of one sequence."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(np.asarray(ids))[None], **inputs).logits[0].numpy()


def picture_inputs(ids, grids, patches, video=False):
    """The keyword arguments of transformers for one sequence with pictures or one video."""
    types = np.isin(ids, [IMAGE, IMAGE_START, IMAGE_END, VIDEO, VIDEO_START, VIDEO_END]).astype(np.int64)
    media = np.where(np.asarray(ids) == IMAGE, 1, np.where(np.asarray(ids) == VIDEO, 2, 0))
    inputs = {
        "moe_mm_token_type_ids": torch.tensor(types)[None],
        "mm_token_type_ids": torch.tensor(media)[None],
    }
    if len(grids):
        suffix = "_videos" if video else ""
        inputs["pixel_values" + suffix] = torch.tensor(np.concatenate(patches))
        inputs["video_grid_thw" if video else "image_grid_thw"] = torch.tensor(np.array(grids))
    return inputs
