"""Small random pipelines built from configurations, with every part that the large ones have."""

from __future__ import annotations

import json
from typing import Any

import torch

# Training text of the tiny tokenizer; other words are encoded as bytes.
WORDS = (
    "a photo of the an in on with and airplane automobile bird cat deer dog frog horse ship truck "
    "sks toy car robot bear wolf stuffed animal plushie"
)
LENGTH = 24  # tokens of a prompt
WIDTH = 32  # of each text encoder
CHANNELS = 4  # of the latents


def tokenizer() -> Any:
    """A CLIP tokenizer with a small byte-pair vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    special, end = ["<|startoftext|>", "<|endoftext|>"], "</w>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=end))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(
        [WORDS] * 4,
        trainers.BpeTrainer(vocab_size=4096, initial_alphabet=letters, end_of_word_suffix=end, show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = [*letters, *(letter + end for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(words), *special])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def text_encoder(vocabulary: Any, *, projected: bool, seed: int) -> Any:
    """A random CLIP text encoder, with a projection of its pooled output or not."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.eos_token_id,
        initializer_factor=2.0,  # large random embeddings keep different prompts distinguishable
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def autoencoder(seed: int, width: int = 16) -> Any:
    """An autoencoder to 4 channels, a quarter of the height and width."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,  # so that it generalizes to other sizes
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def sdxl(seed: int = 0, width: int = 32, size: int = 16, vae: Any = None) -> Any:
    """A pipeline of Stable Diffusion XL's shape, on latents of `size` in height and width.

    The UNet's first level has `width` channels, the second twice as many. Without `vae` a random one is made.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    parts = _parts(seed, vae, projected=False)
    return StableDiffusionXLPipeline(unet=unet.eval(), scheduler=scheduler, add_watermarker=False, **parts)


def _parts(seed: int, vae: Any, *, projected: bool) -> dict[str, Any]:
    """What both pipelines have: an autoencoder, two tokenizers and two text encoders, the first `projected` or not."""
    words = tokenizer()
    return {
        "vae": vae or autoencoder(seed),
        "text_encoder": text_encoder(words, projected=projected, seed=seed + 1),
        "text_encoder_2": text_encoder(words, projected=True, seed=seed + 2),
        "tokenizer": words,
        "tokenizer_2": words,
    }


def sd3(seed: int = 0, width: int = 64, size: int = 16, vae: Any = None) -> Any:
    """A pipeline of Stable Diffusion 3's shape, without its optional third text encoder; see `sdxl`.

    The transformer's `width` is a multiple of 16.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=width // 16,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=size // 2,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_3=None,
        tokenizer_3=None,
        **_parts(seed, vae, projected=True),
    )
