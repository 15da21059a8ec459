"""Whether a sample's outputs depend on its batch with the default routing, beside LoRA, on tiny models of many types.

    python benchmarks/batch_independence.py              # every type of MODELS; two minutes on one core
    python benchmarks/batch_independence.py --only bert wav2vec2
    python benchmarks/batch_independence.py --show       # the table of the committed rows, also into the docs

Each type is built from a tiny configuration and adapted by `LilyConfig(target_modules="all-linear")`, by LoRA, and by
Lily with `batch` routing, which shows what the measure would find. All weights are random, those of adapters large.
The measures are the largest change of a sample's outputs, in standard deviations of the output, when

- other samples, with padding, join its batch;
- it is padded further, with the mask that says so;
- later tokens change, of outputs at earlier positions.

What changes with LoRA too is a property of the model: a bidirectional one sees later tokens, some ignore the mask.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from model_types import ROOT, Row, command, stored
from peft import LoraConfig, get_peft_model
from performance import put
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig

from lily import LilyConfig

ROWS = ROOT / "benchmarks" / "results" / "batch-independence.jsonl"
PAGE = ROOT / "docs" / "migrate-from-lora.md"
TOLERANCE = 1e-4  # rounding in float32 has at most 2e-5
SAMPLES = 3
MEASURES = ("other samples", "padding", "later tokens")
Inputs = dict[str, Tensor]

ADAPTERS = {
    "lora": lambda: LoraConfig(target_modules="all-linear"),
    "lily": lambda: LilyConfig(target_modules="all-linear"),
    "batch": lambda: LilyConfig(target_modules="all-linear", routing="batch"),
}
WIDTH, LAYERS, HEADS, INNER, IMAGE, BINS, VOCABULARY = 32, 2, 4, 48, 32, 16, 61
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "projection_dim"), WIDTH),
    **dict.fromkeys(("output_channels", "feature_size", "mask_feature_size", "hidden_dim", "d_latents"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner", "ffn_dim"), INNER),
    **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward", "mlp_dim"), INNER),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), WIDTH // HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel"), BINS),
    **dict.fromkeys(("visual_feat_dim", "visual_embedding_dim"), BINS),
    **{"vocab_size": VOCABULARY, "image_size": IMAGE, "patch_size": 8, "pad_token_id": 0},
    "initializer_range": 0.1,  # the default makes all attention uniform
}  # fmt: skip
CONVOLUTIONS = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]
}  # fmt: skip
PYRAMID = {
    "image_size": IMAGE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
    "window_size": 2, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
SWIN = {"image_size": IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}

WAVES = "data2vec-audio hubert unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm"
TEXT = {"input_ids": (8,), "attention_mask": (8,)}
WAVE = {"input_values": (800,), "attention_mask": (800,)}
SPEECH = {"input_features": (160, BINS), "attention_mask": (160,)}
PIXELS = {"pixel_values": (3, IMAGE, IMAGE)}
FRAMES = {"pixel_values": (4, 3, IMAGE, IMAGE)}
TARGET = {"decoder_input_ids": (5,)}
BOXES = {"bbox": (8, 4)}


# Model types, and of each input that they have the shape of a sample.
MODELS = (
    (
        "albert bert big_bird camembert canine clip_text_model convbert data2vec-text deberta deberta-v2 distilbert "
        "electra ernie esm esmc eurobert flaubert fnet funnel gte jina_embeddings_v3 longformer luke markuplm "
        "megatron-bert mobilebert modernbert mpnet nomic_bert nystromformer rembert roberta roberta-prelayernorm "
        "roc_bert roformer splinter tapas tipsv2_text_model ultrabert xlm xlm-roberta xlm-roberta-xl xlnet "
        "xmod yoso layoutlm",
        TEXT,
    ),
    (
        "biogpt bloom codegen cohere ctrl falcon gemma gemma2 gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite "
        "imagegpt llama mistral mixtral mpt olmo2 openai-gpt opt persimmon phi phi3 qwen2 qwen3 qwen3_moe stablelm "
        "starcoder2 xglm",
        TEXT,
    ),
    ("bart bigbird_pegasus blenderbot fsmt led m2m_100 marian mbart mt5 pegasus prophetnet t5 umt5", TEXT | TARGET),
    ("lilt", TEXT | BOXES),
    ("layoutlmv3", TEXT | BOXES | {"pixel_values": (3, 8, 8)}),
    ("visual_bert", TEXT | {"visual_embeds": (3, BINS), "visual_attention_mask": (3,)}),
    ("lxmert", TEXT | {"visual_feats": (4, BINS), "visual_pos": (4, 4)}),
    (
        "altclip blip bridgetower chinese_clip clip clipseg flava groupvit metaclip_2 owlv2 owlvit siglip tipsv2 vilt",
        TEXT | PIXELS,
    ),
    (f"sew sew-d {WAVES}", WAVE),
    (
        "lasr_ctc lasr_encoder nemotron3_5_transcribe_asr_audio nemotron3_diarization_audio "
        "nemotron_asr_streaming_encoder parakeet_ctc parakeet_encoder wav2vec2-bert",
        SPEECH,
    ),
    ("gemma4_audio", SPEECH | {"input_features": (160, 128)}),
    ("granite_speech5_encoder", SPEECH | {"input_features": (160, 64)}),
    ("speech_to_text", SPEECH | TARGET),
    ("whisper", {"input_features": (BINS, 40)} | TARGET),
    ("audio-spectrogram-transformer", {"input_values": (64, BINS)}),
    (
        "beit clip_vision_model data2vec-vision deit detr dinov2 dinov2_with_registers dpt focalnet hiera ijepa "
        "sam_vision_model segformer siglip_vision_model swin swinv2 vit vit_mae vit_msn yolos",
        PIXELS,
    ),
    ("mask2former maskformer", {"pixel_values": (3, 64, 64)}),
    ("timesformer videomae vivit", FRAMES),
    ("patchtst patchtsmixer", {"past_values": (16, 2)}),
    ("perceiver", {"inputs": (9, BINS)}),
)

# Options of single types, where the sizes above are not enough.
OWN: dict[str, Row] = {
    "longformer": {"attention_window": 4},
    "funnel": {"architectures": ["FunnelModel"], "block_sizes": [1, 1], "num_decoder_layers": 1},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "lxmert": {"l_layers": 1, "x_layers": 1, "r_layers": 1},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bridgetower": {"hidden_size": 64, "text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64}},
    "detr": {"backbone_config": RESNET, "use_timm_backbone": False, "backbone": None},
    "mask2former": {"backbone_config": PYRAMID, "decoder_layers": 3},
    "maskformer": {"backbone_config": PYRAMID, "fpn_feature_size": WIDTH},
    **dict.fromkeys(WAVES.split(), CONVOLUTIONS),
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 1, "token_dropout": False},
    "xmod": {"default_language": "en_XX"},
    "layoutlmv3": {
        "coordinate_size": 4,
        "shape_size": 8,
        "max_2d_position_embeddings": 64,
        "input_size": 8,
        "patch_size": 4,
    },
    "lilt": {"hidden_size": 48},
    "yolos": {"image_size": [IMAGE, IMAGE]},
    "hiera": {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
    "swin": SWIN,
    "swinv2": SWIN,
    "segformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    "focalnet": {"embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32]},
    "dpt": {"is_hybrid": False},
    "sam_vision_model": {"window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8},
    "vivit": {"image_size": IMAGE, "num_frames": 4, "tubelet_size": [2, 8, 8]},
    "videomae": {"num_frames": 4},
    "timesformer": {"num_frames": 4},
    "audio-spectrogram-transformer": {"max_length": 64, "patch_size": 16},
    "patchtst": {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4},
    "patchtsmixer": {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4},
    "perceiver": {"num_latents": 5, "d_model": BINS, "num_self_attends_per_block": 1, "num_self_attention_heads": 2},
    "whisper": {"max_source_positions": 20, "max_target_positions": 16},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
    "led": {"attention_window": 4},
    "sew": CONVOLUTIONS | {"squeeze_factor": 1},
    "sew-d": CONVOLUTIONS | {"squeeze_factor": 1, "position_buckets": 8},
}


def tiny(kind: Any, **own: Any) -> Any:
    """A configuration, and those inside it, with small sizes."""
    default = vars(kind())
    sizes = {name: size for name, size in SIZES.items() if type(default.get(name)) is type(size)}
    inside = {
        name: tiny(type(value), **own.pop(name, {})).to_dict()
        for name, value in default.items()
        if isinstance(value, PretrainedConfig) and "model_type" not in own.get(name, {})
    }
    return kind(**sizes | inside | own)


def samples(shapes: dict[str, tuple[int, ...]]) -> Inputs:
    """Samples of a batch; the first has no padding, the others some."""
    torch.manual_seed(0)
    made: Inputs = {}
    for name, shape in shapes.items():
        size = (SAMPLES, *shape)
        if name.endswith("mask"):
            made[name] = torch.ones(size, dtype=torch.long)
            made[name][1:, 3 * shape[0] // 4 :] = 0
        elif name.endswith("ids"):
            made[name] = torch.randint(3, VOCABULARY, size)
        else:
            made[name] = torch.zeros(size, dtype=torch.long) if name == "bbox" else torch.randn(size)
    return made


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(0)  # of masks and hashes that some models draw
    return tensors(model(**inputs))


def change(before: list[Tensor], after: list[Tensor], kept: int | None = None) -> float:
    """The largest change of the first sample, in standard deviations; of sequences, at the positions that are kept."""
    found = []
    for x, y in zip(before, after, strict=True):
        x, y = (tensor[:1, :kept] if tensor.ndim > 2 else tensor[:1] for tensor in (x, y))
        if x.shape == y.shape and x.numel() > 1:  # no similarities of each sample with each
            found.append(((x - y).abs().max() / x.std()).item())
    return float(f"{max(found):.2g}")


def measures(model: nn.Module, inputs: Inputs) -> Iterator[tuple[str, float]]:
    """Each measure that the inputs allow, and the change."""
    one = {name: value[:1] for name, value in inputs.items()}
    alone = outputs(model, one)
    yield "other samples", change(alone, outputs(model, inputs))
    if (mask := one.get("attention_mask")) is not None:
        tokens = mask.shape[1]
        padding = 7 * tokens // 8
        padded = {
            name: F.pad(value, (0, 0) * (value.ndim - 2) + (0, padding)) if value.shape[1] == tokens else value
            for name, value in one.items()
        }
        # Convolutions over speech reach beyond its end; behind the text there may be an image.
        kept = tokens if "input_ids" in one else alone[0].shape[1] - 1
        yield "padding", change(alone, outputs(model, padded), kept)
    if (read := "decoder_input_ids" if "decoder_input_ids" in one else "input_ids") in one:
        later = one[read].clone()
        later[:, -2:] = later[:, -2:] % (VOCABULARY - 4) + 3
        states = [[x for x in found if x.ndim > 2] for found in (alone, outputs(model, one | {read: later}))]
        yield "later tokens", change(*states, kept=later.shape[1] - 2)


def adapted(name: str, adapter: Any) -> nn.Module:
    """A tiny model of a type, with an adapter of large random weights."""
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny(CONFIG_MAPPING[name], **copy.deepcopy(OWN.get(name, {}))))
    model = get_peft_model(model, adapter).eval()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if "lora_" in parameter or "lily_" in parameter:
                value.normal_(std=2.0 if "router" in parameter else 0.1)
    return model


def rows(only: list[str] | None = None) -> Iterator[Row]:
    """A row for each type and measure: the change with LoRA, with Lily's default routing, and with `batch`."""
    for types, shapes in MODELS:
        for name in types.split():
            if only and name not in only:
                continue
            found: dict[str, Row] = {}
            for adapter, make in ADAPTERS.items():
                model = adapted(name, make())
                for measure, largest in measures(model, samples(shapes)):
                    row = found.setdefault(measure, {"type": name, "measure": measure})
                    row[adapter] = largest
                    if adapter == "lily":
                        row["routing"] = model.peft_config["default"].routing
            yield from found.values()


def verdict(row: Row) -> str:
    """Which adapters make a sample's outputs depend on what a measure changes."""
    lora, lily = (row[adapter] > TOLERANCE for adapter in ("lora", "lily"))
    return "Lily alone" if lily and not lora else "LoRA alone" if lora and not lily else "both" if lily else "neither"


def table(found: list[Row]) -> str:
    """Numbers of types by measure and verdict, and every type that differs."""
    counts = Counter((row["measure"], verdict(row)) for row in found)
    verdicts = ("neither", "both", "Lily alone", "LoRA alone")
    lines = [f"| outputs change with | {' | '.join(verdicts)} |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {m} | {' | '.join(str(counts[m, v]) for v in verdicts)} |" for m in MEASURES]
    lines += ["", "| type | routing | outputs change with | LoRA | Lily |", "| --- | --- | --- | --- | --- |"]
    for row in found:
        if verdict(row).endswith("alone"):
            lines.append(f"| `{row['type']}` | {row['routing']} | {row['measure']} | {row['lora']} | {row['lily']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__ or "", ROWS, rows, table)
    put(PAGE, "batch-independence", table(stored(ROWS)))
